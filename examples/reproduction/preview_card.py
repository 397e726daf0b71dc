"""Render a model card as a web page, to read it before it is pushed.

    python examples/reproduction/preview_card.py model_cards/adapters/testbed-gender preview.html

The Hub and GitHub render a card much the same way.
"""

import html
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --line: #8886; --quiet: #8882; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif; }
h1, h2 { line-height: 1.25; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h2 { margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .7rem; text-align: left; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--quiet); }
pre { background: var(--quiet); padding: .8rem; overflow-x: auto; border-radius: .4rem; }
code { font-size: .9em; }
summary { cursor: pointer; }
.metadata { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; list-style: none; }
.metadata li { background: var(--quiet); border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; }
"""


def main(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder with a card.")],
    page: Annotated[Path, typer.Argument(help="HTML file to write.")],
) -> None:
    """Render the card of an adapter folder as a page."""
    page.write_text(preview(adapter), "utf-8")


def preview(adapter: Path) -> str:
    """Return the page of an adapter's card; its images stay in the adapter folder."""
    card = ModelCard.load(adapter / "README.md")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    for part in ("pre", "table"):  # wide ones scroll by themselves, also by keyboard
        body = body.replace(f"<{part}>", f'<div class="scroll" tabindex="0"><{part}>')
        body = body.replace(f"</{part}>", f"</{part}></div>")
    body = body.replace("<th>", '<th scope="col">')
    body = body.replace('src="', f'src="{adapter.resolve().as_uri()}/')
    title = html.escape(card.text.strip().splitlines()[0].lstrip("# "))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<ul class="metadata">{"".join(f"<li>{html.escape(fact)}</li>" for fact in facts(card))}</ul>
{body}</main>
</body>
</html>
"""


def facts(card: ModelCard) -> list[str]:
    """Return the metadata that the Hub shows above a card."""
    data = card.data.to_dict()
    kept = ("license", "library_name", "pipeline_tag", "base_model")
    return [f"{name}: {data[name]}" for name in kept if name in data] + data["tags"]


if __name__ == "__main__":
    typer.run(main)
