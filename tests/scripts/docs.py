"""Build the documentation: the first page, the guides, the recipes' pages, and the API reference from the docstrings.

    python tests/scripts/docs.py outputs/docs

Every warning is an error, and so is a link between the pages that leads nowhere.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pdoc.doc
import pdoc.docstrings
import pdoc.render
from jinja2 import pass_context
from jinja2.runtime import Context
from pdoc.render_helpers import to_markdown_with_context

import hf_guidance

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "recipes" / "guides"
MODULES = [
    "hf_guidance",
    *(f"hf_guidance.{name}" for name in ("analysis", "similarity", "targets", "tasks", "guide")),
    *(f"hf_guidance.{name}" for name in ("mapping", "schedule", "experiments.verdicts", "experiments.distillation")),
]
FIRST = "guides.README"  # of the guides
TEMPLATE = """
{% extends "default/module.html.jinja2" %}
{% block title %}{{ titles[module.modulename] }}{% endblock %}
{% block module_list_link %}{% endblock %}
{% block nav_title %}
    {% set up = "../" * module.modulename.count(".") %}
    <a class="home" href="{{ up }}index.html">hf_guidance</a>
{% endblock %}
{% block nav_index %}
    {{ super() }}
    {% for heading, names in sections.items() %}
        <h2>{{ heading }}</h2>
        <ul>
            {% for name in names %}
                <li><a href="{{ "../" * module.modulename.count(".") }}{{ name.replace(".", "/") }}.html"
                    {%- if name == module.modulename %} class="here"{% endif %}>{{ titles[name] }}</a></li>
            {% endfor %}
        </ul>
    {% endfor %}
{% endblock %}
{% block nav_submodules %}{% endblock %}
{% block attribution %}{% endblock %}
{% defaultmacro module_name() %}
    {% if module.modulename.startswith("hf_guidance") %}<h1 class="modulename">{{ module.modulename }}</h1>{% endif %}
{% enddefaultmacro %}
{% defaultmacro bases(cls) %}{% enddefaultmacro %}
{% defaultmacro is_public(doc) %}
    {% if doc.name == "__init__" and doc.kind == "function" %}
        {{ "" if doc.qualname.endswith("Config.__init__") else "true" }}{# of a config the docstring lists all fields #}
    {% elif doc.docstring and not doc.name.startswith("_") %}
        true
    {% endif %}
{% enddefaultmacro %}
"""
STYLE = """
nav.pdoc a.home { font-size: 1.4rem; font-weight: 600; display: block; margin: 0 0 .8rem; }
nav.pdoc a.here { font-weight: 600; }
html, main { scroll-behavior: auto; }
@media (min-width: 770px) {
    :root { --sidebar-width: clamp(12.5rem, 25vw, 20.5rem); }
    main.pdoc { width: calc(64rem + var(--sidebar-width)); }
}
@media (max-width: 769px) { main.pdoc h1 { padding-right: 4rem; } }
nav.pdoc > div { padding-right: .8rem; }
main.pdoc { overflow-wrap: break-word; }
main.pdoc .docstring { max-width: 100%; }
main.pdoc table { display: block; max-width: 100%; overflow-x: auto; font-size: .9em; border-collapse: collapse; }
main.pdoc table code { overflow-wrap: normal; }
main.pdoc th, main.pdoc td { padding: .3rem .6rem; vertical-align: top; border: 1px solid var(--accent2); }
main.pdoc pre { overflow-x: auto; }
main.pdoc img { max-width: 100%; height: auto; }
main.pdoc .signature.multiline { overflow-x: auto; }
"""


# ---------------------------------------------------------------------------------------------------------- pages


def pages() -> dict[str, Path]:
    """Return the pages by their names: the path of a name is the place of its HTML file."""
    found = {"index": ROOT / "README.md", FIRST: GUIDES / "README.md"}
    listed = re.findall(r"^\| \[[^\]]+\]\(([\w.]+)\)", found[FIRST].read_text(encoding="utf-8"), re.MULTILINE)
    found |= {f"guides.{Path(name).stem}": GUIDES / name for name in listed}
    return found | {"recipes.README": ROOT / "recipes" / "README.md", "recipes.LOG": ROOT / "recipes" / "LOG.md"}


def markdown_of(path: Path) -> str:
    """Read a page as Markdown. Of a notebook these are its cells, without outputs."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    fences = {"markdown": "{}", "code": "```python\n{}\n```"}
    return "\n\n".join(fences[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)


def place_of(name: str) -> str:
    return name.replace(".", "/") + ".html"


def with_own_links(text: str, path: Path, name: str, places: dict[Path, str], output: Path) -> str:
    """Let links lead to the pages here, copy images, and leave out links to other files of the repository."""
    up = "../" * name.count(".")

    def replaced(found: re.Match[str]) -> str:
        bang, words, link = found.groups()
        if re.match(r"https?:|#", link):
            return found[0]
        file, _, anchor = link.partition("#")
        there = Path(os.path.normpath(path.parent / file))
        if not there.exists():
            raise SystemExit(f"{path.relative_to(ROOT)} links to {link}, which does not exist.")
        if there in places:
            return f"[{words}]({up}{place_of(places[there])}{'#' + anchor if anchor else ''})"
        if bang:
            copy = output / "images" / there.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, copy)
            return f"![{words}]({up}images/{there.relative_to(ROOT).as_posix()})"
        return f"{words} (`{there.relative_to(ROOT).as_posix()}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


def as_module(name: str, text: str) -> pdoc.doc.Module:
    """Make a module whose docstring is the page, so that pdoc renders it beside the others."""
    module = types.ModuleType(name, re.sub(r"^```sh$", "```bash", text, flags=re.MULTILINE))
    vars(module).update(__docformat__="markdown", __all__=[])
    return pdoc.doc.Module(module)


def name_aliases() -> None:
    """Put classes in the place of type aliases that are written as text, such as `Json`, which pdoc cannot evaluate."""
    ours = [module for name, module in sorted(sys.modules.items()) if name.startswith("hf_guidance.")]
    for module in ours:
        for name, kind in getattr(module, "__annotations__", {}).items():
            if kind != "TypeAlias" or not isinstance(alias := vars(module)[name], str):
                continue
            stand_in = type(name, (), {"__module__": module.__name__})
            for user in ours:
                if vars(user).get(name) is alias:
                    vars(user)[name] = stand_in


def with_defaults() -> None:
    """Add the default of each field to the docstring of `GuidanceConfig`."""
    words = hf_guidance.GuidanceConfig.__doc__ or ""
    defaults = vars(hf_guidance.GuidanceConfig())
    for field in dataclasses.fields(hf_guidance.GuidanceConfig):
        words = words.replace(f"\n    {field.name}: ", f"\n    {field.name} = {defaults[field.name]!r}: ")
    hf_guidance.GuidanceConfig.__doc__ = words


@pass_context
def to_markdown(context: Context, docstring: str) -> str:
    """Do as pdoc does, but keep what stands in angle brackets, which Markdown takes for HTML."""
    if not context["module"].modulename.startswith("hf_guidance"):
        return to_markdown_with_context(context, docstring)
    docstring = docstring.replace("  # doctest: +SKIP", "")
    parts = re.split(r"(`[^`]*`|^\s*(?:>>>|\.\.\.) .*$)", docstring, flags=re.MULTILINE)
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return to_markdown_with_context(context, "".join(parts))


def title_of(name: str, text: str) -> str:
    if name.startswith("hf_guidance"):
        return name
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert found, f"{name} has no heading"
    return re.sub(r"[`*]", "", found[1])


# ------------------------------------------------------------------------------------------------------- the links


def with_api_links(page: str, name: str) -> str:
    """Link the public names, where a page writes them as code, to the API reference."""
    up = "../" * name.count(".")

    def linked(found: re.Match[str]) -> str:
        return f'<a href="{up}hf_guidance.html#{found[1]}">{found[0]}</a>'

    names = "|".join(hf_guidance.__all__)
    return re.sub(rf"(?<!\">)<code>({names})</code>", linked, page)


def with_github_anchors(page: str) -> str:
    """Give headings the anchors that the Markdown's links use, which are GitHub's."""

    def renamed(found: re.Match[str]) -> str:
        words = html.unescape(re.sub(r"<[^>]+>", "", found[3]))
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
        return f'<h{found[1]} id="{anchor}">{found[3]}</h{found[1]}>'

    anchors = re.findall(r'<h[1-6] id="([^"]+)">(.*?)</h[1-6]>', page)
    page = re.sub(r'<h([1-6]) id="([^"]+)">(.*?)</h\1>', renamed, page)
    for old, words in anchors:  # of the table of contents
        new = re.sub(r"[^\w\- ]", "", html.unescape(re.sub(r"<[^>]+>", "", words)).lower()).strip().replace(" ", "-")
        page = page.replace(f'href="#{old}"', f'href="#{new}"')
    return page


def wrong_links(output: Path) -> Iterator[str]:
    """Yield the links between pages that lead to no file, or to no place in it."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(output.rglob("*.html"))}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for link in re.findall(r'\b(?:href|src)="(?!https?:|data:|mailto:|\$\{)([^"]+)"', text):
            file, _, anchor = unquote(html.unescape(link)).partition("#")
            there = Path(os.path.normpath(path.parent / file)) if file else path
            if not there.exists() or (anchor and there in ids and anchor not in ids[there]):
                yield f"{path.relative_to(output)}: {link}"


# ----------------------------------------------------------------------------------------------------------- all


def build(output: Path) -> None:
    """Write all pages.

    Raises:
        SystemExit: If a page links to something that does not exist.
        Warning: If pdoc warns.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    there = pages()
    places = {path: name for name, path in there.items()}
    texts = {name: with_own_links(markdown_of(path), path, name, places, output) for name, path in there.items()}
    modules = {name: as_module(name, text) for name, text in texts.items()}
    modules |= {name: pdoc.doc.Module(importlib.import_module(name)) for name in MODULES}
    name_aliases()
    with_defaults()
    pdoc.render.env.filters["to_markdown"] = to_markdown
    guides = [name for name in texts if name.startswith("guides.")]
    settings = pdoc.render.env.globals
    settings["titles"] = {name: title_of(name, texts.get(name, "")) for name in modules}
    settings["sections"] = {"Guides": guides, "Recipes": ["recipes.README", "recipes.LOG"], "Reference": MODULES}
    pdoc.docstrings.GOOGLE_LIST_SECTIONS.append("Fields")  # of GuidanceConfig
    with tempfile.TemporaryDirectory() as templates:
        (Path(templates) / "module.html.jinja2").write_text(TEMPLATE, encoding="utf-8")
        (Path(templates) / "custom.css").write_text(STYLE, encoding="utf-8")
        pdoc.render.configure(
            docformat="google", include_undocumented=False, show_source=False, template_directory=Path(templates)
        )
        for name, module in modules.items():
            page = pdoc.render.html_module(module, modules)
            if name in texts:
                page = with_api_links(with_github_anchors(page), name)
            place = output / place_of(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(page, encoding="utf-8")
        (output / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")
    if wrong := list(wrong_links(output)):
        raise SystemExit("These links lead nowhere:\n" + "\n".join(wrong))
    print(f"{len(modules)} pages in {output}: open {output / 'index.html'}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Path(sys.argv[1]))
