"""Publish an adapter: write its model card from its evaluation, and list what would be uploaded.

    python examples/quickstart/publish.py

Nothing is uploaded. To publish, log in with `hf auth login`, set your own repository, and leave out
`dry_run`.
"""

import shutil
from pathlib import Path

from diffusers_fair.publishing.card import write_card
from diffusers_fair.publishing.hub import push_adapter

TRAINED = Path(__file__).parents[2] / "model_cards" / "adapters" / "testbed-gender"
ADAPTER = Path("runs/quickstart/published")
REPOSITORY = "your-name/testbed-gender"

shutil.copytree(TRAINED, ADAPTER, dirs_exist_ok=True)
write_card(ADAPTER)  # for an adapter of your own: write_card(ADAPTER, report=FOLDER)
push = push_adapter(ADAPTER, REPOSITORY, dry_run=True)
for name, size in push.files.items():
    print(f"{size:>12,} bytes  {name}")
print(f"nothing was uploaded; see {ADAPTER / 'README.md'}")
