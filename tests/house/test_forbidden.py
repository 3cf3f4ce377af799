"""Things that have hurt servers like this one, kept out by reading the syntax tree of every Python file."""

from __future__ import annotations

import ast

import pytest

from tests.house.tree import dotted, imports_of, parsed, program, python_files

# Decoders that run what they read, and ways to run text.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "imp"}
CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "os.execl", "yaml.load", "yaml.unsafe_load", "torch.load",
    "numpy.load", "np.load", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
}  # fmt: skip
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
DATES = {"text/template_worker.py"}  # strftime_now, which chat templates may call
TASKS = {"create_task", "ensure_future", "run_coroutine_threadsafe"}


def findings(tree: ast.Module) -> list[str]:
    found = [f"{line}: imports {module}" for line, module in imports_of(tree) if module.split(".")[0] in MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in CALLS:
                found.append(f"{node.lineno}: calls {dotted(node.func)}")
            found += [
                f"{node.lineno}: {keyword.arg}="
                for keyword in node.keywords
                if keyword.arg in KEYWORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
            if dotted(node.func).split(".")[-1] == "suppress" and any(dotted(a) in ("Exception", "BaseException") for a in node.args):
                found.append(f"{node.lineno}: suppresses every exception")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and dotted(node.value.func).split(".")[-1] in TASKS:
            found.append(f"{node.lineno}: starts a task that nobody holds")
        if (
            isinstance(node, ast.ExceptHandler)
            and _is_broad(node)
            and all(isinstance(s, ast.Pass | ast.Continue) or _is_dots(s) for s in node.body)
        ):
            found.append(f"{node.lineno}: swallows every exception")
    return found


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type] if handler.type else []
    return handler.type is None or any(dotted(item) in ("Exception", "BaseException") for item in caught)


def _is_dots(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_nothing_forbidden() -> None:
    assert not [f"{name}:{finding}" for name in python_files() for finding in findings(parsed(name))]


def test_clocks_are_monotonic() -> None:
    """Wall-clock time is for the `created` of an answer, whole seconds: `int(time.time())`; timeouts are monotonic."""
    assert not [finding for name in program() if name not in DATES for finding in wall_clocks(name)]


def wall_clocks(name: str) -> list[str]:
    stamps = {
        id(node.args[0])
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Call) and dotted(node.func) == "int" and len(node.args) == 1
    }
    walls = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now")
    return [
        f"{name}:{node.lineno}" for node in ast.walk(parsed(name))
        if isinstance(node, ast.Call) and dotted(node.func) in walls and id(node) not in stamps
    ]  # fmt: skip


def test_no_assert_guards_anything() -> None:
    """`python -O` drops asserts. What only tells a type checker that a value is there is let through."""
    assert not [
        f"{name}:{node.lineno}" for name in program() for node in ast.walk(parsed(name))
        if isinstance(node, ast.Assert) and not _narrows(node.test)
    ]  # fmt: skip


def _narrows(test: ast.expr) -> bool:
    if isinstance(test, ast.BoolOp):
        return all(_narrows(value) for value in test.values)
    if isinstance(test, ast.Call):
        return dotted(test.func) == "isinstance"
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and isinstance(test.comparators[0], ast.Constant)


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("import pickle", 1),
        ("from multiprocessing import connection\nimport dill as d", 1),
        ("eval('1')", 1),
        ("import torch\ntorch.load('x')", 1),
        ("import subprocess\nsubprocess.run('x', shell=True)", 1),
        ("import subprocess\nsubprocess.run(['x'], shell=False)", 0),
        ("asyncio.create_task(f())", 1),
        ("task = asyncio.create_task(f())", 0),
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept (ValueError, BaseException):\n    ...", 1),
        ("try:\n    f()\nexcept ValueError:\n    pass", 0),
        ("with contextlib.suppress(Exception):\n    f()", 1),
    ],
)
def test_the_lint_sees_what_it_is_for(source: str, number: int) -> None:
    assert len(set(findings(ast.parse(source)))) == number
