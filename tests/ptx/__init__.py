"""An emulator of NVIDIA PTX: runs the text that numba-cuda emits, on numpy, and checks what hardware would not tell."""
