"""What importing the package does: nothing but define names."""

import ast
from pathlib import Path

import opensora

PACKAGE = Path(opensora.__file__).parent


def statements(path: Path) -> list[str]:
    """Those of a module that do something when it is imported, besides defining and importing."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    harmless = (ast.Import, ast.ImportFrom, *functions, ast.ClassDef, ast.Assign, ast.AnnAssign)
    found = []
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        for_types = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        is_main = isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)
        if not (isinstance(statement, harmless) or is_text or for_types or is_main):
            found.append(f"{path.relative_to(PACKAGE)}:{statement.lineno} {ast.unparse(statement)}")
    return found


def test_modules_only_define_names():
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in statements(path)] == []
