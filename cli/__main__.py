"""`python -m cli COMMAND ...` is `numbatch COMMAND ...`. Spawned ranks import this file again: hence the guard."""

from cli.entry import program

if __name__ == "__main__":
    program()
