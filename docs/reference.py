"""The reference: a page for each module, from its source alone: signatures with their shapes, the comment beside each parameter, the code.

Nothing is written here by hand. Sphinx's own domain for Python is used, so that names are found by the search and can be linked to.
"""
import ast
import importlib
import inspect
import re
from pathlib import Path

from chapters import anchor, link_names
from fastcore.docments import docments

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST = 160                               # letters of a constant's value


def page(module: str, path: Path, notebook: str, summary: str) -> str:
    "The page of a module, `losses.ranking`; `notebook` is where it is explained, from the folder of notebooks."
    live, tree = importlib.import_module(f"crossmodal.{module}"), ast.parse(path.read_text(encoding="utf-8"))
    public = set(live.__all__)
    parts = [f"(api-{module})=\n# {module}", link_names(summary), f"Explained in its notebook: [{notebook}](/{notebook}).",
             f"```{{py:module}} crossmodal.{module}\n```"]
    nodes = {name: node for node in tree.body for name in names_of(node) if name in public}
    if constants := [name for name, node in nodes.items() if isinstance(node, (ast.Assign, ast.AnnAssign))]:
        nodes = {name: node for name, node in nodes.items() if name not in constants} | {name: nodes[name] for name in constants}
    for name, node in nodes.items(): parts.append(entry(module, name, node, getattr(live, name)))
    for name in sorted(public - nodes.keys()):
        home = getattr(getattr(live, name), "__module__", "")
        if home.startswith("crossmodal."): parts.append(f"{link_names(f'`{home}.{name}`')} can be imported from here too.")
    return "\n\n".join(parts) + "\n"


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target]) if isinstance(name, ast.Name)]


def entry(module: str, name: str, node: ast.stmt, value) -> str:
    if isinstance(node, ast.ClassDef): return class_entry(module, node, value)
    if isinstance(node, FUNCTIONS):
        body = [docstring(node), comments(value), explained(module, name), source(value)]
        return directive("py:function", name + signature(node), body)
    text = ast.unparse(node.value) if node.value else "..."
    return directive("py:data", name, [f"```python\n{text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}\n```"])


def class_entry(module: str, node: ast.ClassDef, value) -> str:
    init = next((part for part in node.body if isinstance(part, FUNCTIONS) and part.name == "__init__"), None)
    bases = [ast.unparse(base) for base in node.bases]
    body = [f"Is a {', '.join(link_names(f'`{base}`') for base in bases)}." if bases else "", docstring(node),
            comments(value.__init__) if init else fields(value, node), explained(module, node.name), source(value)]
    body += [method_entry(part, value) for part in node.body if isinstance(part, FUNCTIONS) and not part.name.startswith("_") and ast.get_docstring(part)]
    return directive("py:class", node.name + (signature(init, bound=True, returns=False) if init else ""), body, fence=":::::")


def method_entry(node, owner: type) -> str:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    if marks & {"property", "cached_property"}: return directive("py:property", node.name, [docstring(node)], fence="::::")
    said = comments(inspect.unwrap(getattr(owner, node.name)))
    return directive("py:method", node.name + signature(node, bound=True), [docstring(node), said], ":classmethod:" * ("classmethod" in marks), "::::")


def directive(kind: str, argument: str, body: list[str], options: str = "", fence: str = ":::") -> str:
    return "\n".join([f"{fence}{{{kind}}} {argument}", *([options] if options else []), "", "\n\n".join(part for part in body if part), fence])


def signature(node, bound: bool = False, returns: bool = True) -> str:
    "The arguments with their shapes, as they are written."
    args = ast.parse(ast.unparse(node.args).join(["def f(", "): 0"])).body[0].args
    if bound and not any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list): (args.posonlyargs or args.args).pop(0)
    return f"({ast.unparse(args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns and returns else "")


def docstring(node) -> str:
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return link_names(re.sub(r"([*|])", r"\\\1", text) if "`" not in text else text)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def comments(function) -> str:
    "Parameters with their types, which hold the shapes, and the comment beside each; last what is returned."
    if function is None: return ""
    found = [(name, ast.unparse(part) if part else "", text or "") for name, part, text in parameters(function)]
    if not any(text for *_, text in found): return ""
    rows = [row("returns" if name == "return" else f"`{name}`", f"`{kind}`" if kind else "", link_names(text)) for name, kind, text in found if kind or text]
    return "\n".join([row("parameter", "type", ""), "|---|---|---|", *rows])


def parameters(function):
    "Name, annotation and comment of each parameter, and of what is returned, as they stand in the source."
    node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function))).body[0]
    said = docments(function)
    args = node.args
    for arg in [*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]:
        if arg.arg not in ("self", "cls"): yield arg.arg, arg.annotation, said.get(arg.arg)
    yield "return", node.returns, said.get("return")


def fields(value, node: ast.ClassDef) -> str:
    "The fields of a class that is made of them: name, type, default, and the comment beside it."
    own = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if not own: return ""
    found = docments(value)
    rows = [row(f"`{part.target.id}`", f"`{ast.unparse(part.annotation)}`", f"`{ast.unparse(part.value)}`" if part.value else "",
                link_names(found.get(part.target.id) or "")) for part in own]
    return "\n".join([row("field", "type", "default", ""), "|---|---|---|---|", *rows])


def explained(module: str, name: str) -> str:
    return f"[In its chapter](#{anchor(module, name)})"


def source(value) -> str:
    return f"<details class=\"source\"><summary>Source</summary>\n\n```python\n{inspect.getsource(value).rstrip()}\n```\n\n</details>"
