"""Audit a folder of existing images.

    python examples/quickstart/audit_folder.py

The folder has a subfolder of images for each prompt. The prompt is the name of the subfolder, or the
text of a file `prompt.txt` in it. Here the testbed generates the images. The report is written to
runs/quickstart/audit.
"""

import shutil
from pathlib import Path

from diffusers_fair import testbed
from diffusers_fair.evaluation.audit import audit
from diffusers_fair.testbed import world
from diffusers_fair.testbed.backend import load_evaluation_judges

IMAGES, REPORT = Path("runs/quickstart/images"), Path("runs/quickstart/audit")
PROMPTS = [f"a photo of the face of a {job}, a person" for job in ("senator", "nurse", "chef")]

pipe = testbed.pipeline()
for prompt in PROMPTS:
    (IMAGES / prompt).mkdir(parents=True, exist_ok=True)
    images = pipe(prompt, num_images_per_prompt=12, num_inference_steps=12, guidance_scale=4.5)
    for i, image in enumerate(images.images):
        image.save(IMAGES / prompt / f"{i:02d}.png")

shutil.rmtree(REPORT, ignore_errors=True)  # from an earlier run
attribute = world.GENDER  # Attribute("gender", ("female", "male"), (0.5, 0.5))
report = audit(IMAGES, [attribute], judges=load_evaluation_judges(["gender"]), out=REPORT)
bias = report.summary.bias["gender"]
print(
    f"bias {bias.mean:.2f}; noise floor {bias.noise_floor:.2f}, for a generator exactly on target"
)
print(f"see {REPORT / 'report.html'}")
