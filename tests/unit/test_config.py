import re
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from diffusers_fair import Attribute, RunConfig
from diffusers_fair.config.keys import recipe_keys
from diffusers_fair.config.recipe import read_recipe, recipes
from diffusers_fair.config.schema import AttributeSection, OptimizerSection
from diffusers_fair.training.run_folder import check_run_folder, claim_run_folder

TOY = """
base: {model: testbed}
attributes:
  - {name: shape, classes: [round, square, flat]}
prompts: {sets: [toys]}
output: runs/toy
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


# ---- good recipes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_load_and_come_back(name, tmp_path):
    config = RunConfig.load(name)
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert RunConfig.load(tmp_path / "copy.yaml") == config


@pytest.mark.parametrize("name", recipes())
def test_recipes_for_real_models_choose_their_micro_batch(name):
    train = RunConfig.load(name).train
    assert train.memory_budget == (None if name.startswith("testbed") else "auto")
    assert train.micro_batch is None


@pytest.mark.parametrize("value", [0, -1, "8 GB", True, float("inf")])
def test_a_memory_budget_is_a_number_or_auto(toy, value):
    message = r"train\.memory_budget: expected a number of GB above 0, auto or null, got"
    with pytest.raises(ValueError, match=message):
        RunConfig.load(toy, {"train": {"memory_budget": value}})
    for budget in (8, 0.5, None, "auto"):
        data = {"train": {"memory_budget": budget}}
        assert RunConfig.load(toy, data).train.memory_budget == budget
    both = RunConfig.load(toy, {"train": {"memory_budget": "auto", "micro_batch": 2}}).train
    assert both.micro_batch == 2


def test_testbed_recipe_is_shipped():
    assert "testbed-gender" in recipes()
    assert RunConfig.load("testbed-gender").base.model == "testbed"


def test_defaults_are_the_papers(toy):
    config = RunConfig.load(toy)
    assert config.attributes[0].attribute() == Attribute("shape", ("round", "square", "flat"))
    assert config.attributes[0].threshold == 0.8
    assert config.attributes[0].target_feedback == 0  # the target stays where it was put
    assert config.attributes[0].semantics_changed == config.attributes[0].semantics_face == 0.2
    assert (config.losses.semantics, config.losses.face) == (8, 0)  # realism is on when asked for
    assert config.prompts.images_per_prompt == 24
    assert config.adapter.rank == 50
    assert config.sampling.steps == (19, 23)
    assert config.optimizer.lr == 5e-5
    assert config.optimizer.ema_decay == 0.996
    assert config.train.iterations == 10_000


def test_every_key_is_listed_once_with_its_documentation():
    keys = recipe_keys()
    paths = [key.path for key in keys]
    assert len(set(paths)) == len(paths)
    assert all(key.documentation for key in keys)
    assert set(RunConfig.model_fields) <= {path.partition(".")[0] for path in paths}
    assert {f"optimizer.{name}" for name in OptimizerSection.model_fields} <= set(paths)
    assert "evaluation.models.classifiers.NAME.phrases" in paths


def test_every_default_is_written_out(toy):
    data = yaml.safe_load(RunConfig.load(toy).to_yaml())
    assert data["train"]["seed"] == 0
    assert data["attributes"][0] == {
        "name": "shape",
        "classes": ["round", "square", "flat"],
        "target": [],
        "targets": {},
        "region": "face",
        "words": {},
        "nouns": {},
        "threshold": 0.8,
        "cost": 1.0,
        "steering": 0.0,
        "semantics_changed": 0.2,
        "semantics_face": 0.2,
    }


def test_a_recipe_extends_another(toy, tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text(
        f"extends: {toy}\nprompts: {{images_per_prompt: 6}}\n"
        "attributes: [{name: shape, classes: [round, flat]}]\n"
    )
    config = RunConfig.load(path, ["train.seed=3"])
    assert config.prompts.sets == {"toys": 1.0}  # of the recipe below
    assert config.prompts.images_per_prompt == 6
    assert [a.classes for a in config.attributes] == [("round", "flat")]  # lists are replaced
    assert config.train.seed == 3
    assert config.output == "runs/toy"
    assert "extends" not in yaml.safe_load(config.to_yaml())


def test_an_extended_recipe_must_exist_and_not_be_circular(toy, tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("extends: testbed-gander\n")
    with pytest.raises(ValueError, match=r"no recipe 'testbed-gander'.* mean 'testbed-gender'"):
        RunConfig.load(path)
    path.write_text(f"extends: {path}\n")
    with pytest.raises(ValueError, match="extends itself"):
        RunConfig.load(path)


def test_an_extended_recipe_lies_beside_the_one_that_extends_it(toy, tmp_path, monkeypatch):
    (tmp_path / "more.yaml").write_text("extends: toy.yaml\ntrain: {seed: 3}\n")
    (tmp_path / "most.yaml").write_text("extends: ./more.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert RunConfig.load("../most.yaml").train.seed == 3
    (tmp_path / "elsewhere" / "mine.yaml").write_text("extends: ../most.yaml\n")
    (tmp_path / "old.yaml").write_text("extends: mine.yaml\n")  # of the working directory
    assert RunConfig.load("../old.yaml").train.seed == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home.yaml").write_text("extends: ~/toy.yaml\n")
    assert RunConfig.load("~/home.yaml") == RunConfig.load(toy)
    (tmp_path / "a.yaml").write_text("extends: elsewhere/../b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        RunConfig.load("../a.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("-010", -10), ("1_000", 1000), ("0x10", 16), ("1:30", "1:30")]
)
def test_numbers_are_what_people_read(toy, text, value):
    """In YAML 1.1, 010 is 8 and 1:30 is 90."""
    assert read_recipe(toy, [f"train.iterations={text}"])["train"]["iterations"] == value


@pytest.mark.parametrize("text", ["2026-12-01", "1:30.5"])
def test_names_of_folders_may_look_like_times(toy, text):
    assert RunConfig.load(toy, [f"output={text}"]).output == text


def test_no_number_is_a_truth_value(toy):
    """Pydantic takes true for 1."""
    for key in recipe_keys():
        if re.fullmatch(r"default: -?[0-9.e-]+", key.default) and "NAME" not in key.path:
            with pytest.raises(ValueError, match=r"expected a valid .*, got True"):
                RunConfig.load("testbed-gender", [f"{key.path}=true"])


def test_sets_have_weights(toy):
    assert RunConfig.load(toy).prompts.sets == {"toys": 1.0}
    mixed = RunConfig.load(toy, {"prompts": {"sets": {"a": 3, "b": 1}}})
    assert mixed.prompts.sets == {"a": 3.0, "b": 1.0}
    with pytest.raises(ValueError, match=r"prompts\.sets\.a: expected greater than 0, got 0"):
        RunConfig.load(toy, ["prompts.sets={a: 0}"])


def test_overrides(toy):
    config = RunConfig.load(
        toy,
        [
            "train.iterations=10",
            "attributes.0.target=[.5,.25,.25]",
            "optimizer.lr=5e-5",
            "gradient.replay_steps=4",
            "sampling.steps=[5, 7]",
            "output=a=b",
        ],
    )
    assert config.train.iterations == 10
    assert config.attributes[0].attribute().target == (0.5, 0.25, 0.25)
    assert config.optimizer.lr == 5e-5
    assert config.gradient.replay_steps == 4
    assert config.sampling.steps == (5, 7)
    assert config.output == "a=b"


def test_a_mapping_overrides_only_its_keys(toy):
    config = RunConfig.load(toy, {"train": {"seed": 3}, "train.keep": 5, "prompts": {"train": "x"}})
    assert (config.train.seed, config.train.keep, config.train.iterations) == (3, 5, 10_000)
    assert (config.prompts.train, config.prompts.sets) == ("x", {"toys": 1.0})


@pytest.mark.parametrize("key", ["steering", "target_feedback"])
def test_a_key_may_be_given_by_its_released_name(toy, key):
    """The last one counts, whatever it is called, and the released name is written."""
    other = {"steering": "target_feedback", "target_feedback": "steering"}[key]
    toy.write_text(TOY.replace("flat]}", f"flat], {other}: 0.5}}"))
    assert RunConfig.load(toy).attributes[0].target_feedback == 0.5
    config = RunConfig.load(toy, [f"attributes.0.{key}=0.25"])
    assert config.attributes[0].target_feedback == 0.25
    assert yaml.safe_load(config.to_yaml())["attributes"][0]["steering"] == 0.25
    shape = {"name": "shape", "classes": ["round", "flat"], key: 0.75}
    assert RunConfig.load(toy, {"attributes": [shape]}).attributes[0].target_feedback == 0.75
    assert key in shape  # what was given is left as it is
    assert AttributeSection(**shape).target_feedback == 0.75
    with pytest.raises(ValueError, match=r"attributes\.0\.target_feedback: expected greater than"):
        RunConfig.load(toy, [f"attributes.0.{key}=-1"])


def test_a_number_of_steps_is_a_range_of_one(toy):
    assert RunConfig.load(toy, ["sampling.steps=5"]).sampling.steps == (5, 5)


def test_sections_cannot_be_changed(toy):
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig.load(toy).train.seed = 3


def test_every_key_is_documented():
    for section in (RunConfig, *(f.annotation for f in RunConfig.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            documented = field.description or getattr(field.annotation, "__doc__", None)
            assert documented or name == "attributes", f"{section.__name__}.{name}"
    assert all(field.description for field in AttributeSection.model_fields.values())


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("train.iteration=3", r"unknown key 'train\.iteration': did you mean 'iterations'\?"),
        ("trian.iterations=3", r"unknown key 'trian': did you mean 'train'\?"),
        ("attributes.0.treshold=1", r"'attributes\.0\.treshold': did you mean 'threshold'\?"),
        ("zzz=1", "unknown key 'zzz': known are adapter, attributes, base"),
        # wrong targets
        (
            "attributes.0.words={oval: [egg-shaped]}",
            r"words are for the classes \['round', 'square', 'flat'\], got 'oval'",
        ),
        (
            "attributes.0.nouns={oval: [egg]}",
            r"nouns are for the classes \['round', 'square', 'flat'\], got 'oval'",
        ),
        ("attributes.0.words={flat: ['']}", "flat.0: expected printable characters, got ''"),
        ("attributes.0.nouns={flat: []}", r"attributes\.0\.nouns\.flat: expected 1 or more, got 0"),
        ("attributes.0.target=[-.5,1,.5]", "target of attribute 'shape' must not hold negative"),
        ("attributes.0.target=[.5,.5,.5]", r"'shape' must sum to 1, got .* which sums to 1\.5"),
        ("attributes.0.target=[.5,.5]", "target of attribute 'shape' needs 3 shares.* got 2"),
        ("attributes.0.target=[a,b,c]", r"attributes\.0\.target\.0: expected a valid number"),
        ("attributes.0.classes=[one]", "needs two or more different classes"),
        ("attributes=[]", "attributes: expected 1 or more, got 0"),
        # no prompts
        ("prompts.sets=[]", r"prompts\.sets: expected 1 or more, got 0"),
        ("prompts=null", "prompts: expected a section of keys and values, got None"),
        # wrong types and values
        ("train.iterations=ten", r"train\.iterations: expected a valid integer, got 'ten'"),
        ("train.iterations=2.5", r"train\.iterations: expected a valid integer, got 2\.5"),
        ("train.iterations=true", r"train\.iterations: expected a valid integer, got True"),
        ("train.iterations=0", "expected greater than or equal to 1, got 0"),
        ("optimizer.lr=fast", r"optimizer\.lr: expected a valid number, got 'fast'"),
        ("optimizer.text_encoder_lr=0", r"text_encoder_lr: expected greater than 0, got 0"),
        ("optimizer.lr=.inf", r"optimizer\.lr: expected a finite number, got inf"),
        ("attributes.0.semantics_face=2", "expected less than or equal to 1, got 2"),
        ("losses.face=-1", r"losses\.face: expected greater than or equal to 0, got -1"),
        ("losses.semantics_changed=.2", r"losses\.semantics_changed': did you mean 'semantics'"),
        ("gradient.standardize=x", "expected 'paper', 'exact' or 'none', got 'x'"),
        ("base.model=3", r"base\.model: expected a valid string, got 3"),
        ("train=3", "train: expected a section of keys and values, got 3"),
        (
            "adapter.components=[vae]",
            "expected 'text_encoder', .* 'transformer' or 'soft_tokens', got 'vae'",
        ),
        ("sampling.steps=[5,3]", r"sampling\.steps must be \[low, high\], low <= high"),
        ("sampling.steps=[1,2,3]", r"sampling\.steps: .*at most 2 items.*, got \[1, 2, 3\]"),
        ("gradient.replay_steps=20", r"at most sampling\.steps \(19\), got 20"),
        ("gradient.method=x", "expected 'replay', 'autograd', 'naive' or 'truncated', got 'x'"),
        (
            "gradient={method: autograd, replay_steps: 3}",
            "gradient: replay_steps is for method 'replay', got 3 with method 'autograd': set it",
        ),
        (
            "gradient.truncated_steps=2",
            "truncated_steps is for method 'truncated', got 2 with method 'replay': set it to null",
        ),
        ("gradient.method=truncated", "method 'truncated' needs truncated_steps, the number"),
        (
            "gradient={method: truncated, truncated_steps: 20}",
            r"gradient\.truncated_steps must be at most sampling\.steps \(19\), got 20",
        ),
        ("train.iterations=1:30", r"train\.iterations: expected a valid integer, got '1:30'"),
        ("train.seed=4294967296", "expected less than 4294967296, got 4294967296"),
        ("optimizer.lr=true", r"optimizer\.lr: expected a valid number, got True"),
        ("attributes.0.target=[true,false,false]", r"target\.0: expected a valid number, got True"),
        ("adapter.components=[unet,unet]", r"different values, got \['unet', 'unet'\]: leave out"),
        ("prompts.sets=[a,a]", r"sets: expected different values, got \['a', 'a'\]: leave out"),
        ("output=''", "output: expected a text, got an empty one"),
        # overrides
        ("train.iterations", "an override must be key=value, got 'train.iterations'"),
        ("=3", "an override must be key=value"),
        ("train.seed=[", r"'train\.seed=\[' is not YAML"),
        ("attributes.1.name=x", r"override 'attributes\.1\.name': expected 0 to 0, got '1'"),
        ("attributes.x.name=x", "expected 0 to 0, got 'x'"),
        ("output.x=1", r"override 'output\.x': 'output' has no keys"),
    ],
)
def test_bad_values(toy, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        RunConfig.load(toy, [override])
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)


def test_missing_key(toy):
    toy.write_text(TOY.replace("{model: testbed}", "{}"))
    with pytest.raises(ValueError, match=r"toy\.yaml': 'base\.model' is missing"):
        RunConfig.load(toy)


def test_two_problems_are_both_named(toy):
    with pytest.raises(ValueError, match=r"train\.seed: .*; unknown key 'colour'"):
        RunConfig.load(toy, ["train.seed=-1", "colour=red"])


def test_attributes_of_one_name(toy):
    toy.write_text(TOY.replace("prompts", "  - {name: shape, classes: [a, b]}\nprompts"))
    with pytest.raises(ValueError, match=r"must have different names, got \['shape', 'shape'\]"):
        RunConfig.load(toy)


def test_unknown_recipe(tmp_path):
    message = r"no recipe 'testbed-gendre', .*shipped: did you mean 'testbed-gender'\?"
    with pytest.raises(ValueError, match=message):
        RunConfig.load("testbed-gendre")
    with pytest.raises(ValueError, match=r"nowhere\.yaml', neither a file nor shipped"):
        RunConfig.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold keys and values, got"),
        ("a: [", "is not YAML"),
        ("", "got None"),
        ("extends: 3", "expected the name or the file of a recipe, got 3"),
    ],
)
def test_files_that_are_not_recipes_are_refused(toy, text, message):
    toy.write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(toy)


def test_a_recipe_in_another_encoding(toy):
    toy.write_bytes("output: caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"toy\.yaml' is not UTF-8 text: save it as UTF-8"):
        RunConfig.load(toy)


# ---- run folder ----------------------------------------------------------------------------------


def test_run_folder_is_created_and_reused(toy, tmp_path):
    config = RunConfig.load(toy, [f"output={tmp_path / 'runs' / 'a'}"])
    folder = claim_run_folder(config).path
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    assert RunConfig.load(folder / "recipe.yaml") == config
    (folder / "events.jsonl").write_text("{}")
    assert claim_run_folder(config).path == folder


def test_folder_with_another_run_is_refused(toy, tmp_path):
    output = f"output={tmp_path / 'run'}"
    folder = claim_run_folder(RunConfig.load(toy, [output, "train.iterations=5"])).path
    (folder / "events.jsonl").touch()
    before = (folder / "recipe.yaml").read_text()
    message = r"holds another run \(train\.seed is 0 there and 1 here\): choose another folder"
    with pytest.raises(ValueError, match=message):
        claim_run_folder(RunConfig.load(toy, [output, "train.iterations=9", "train.seed=1"]))
    message = r"holds another run \(train\.iterations is 5 there and 4 here\)"
    with pytest.raises(ValueError, match=message):
        claim_run_folder(RunConfig.load(toy, [output, "train.iterations=4"]))
    message = r"holds another run \(attributes\.0\.target\.0 is None there and 0\.5 here\)"
    with pytest.raises(ValueError, match=message):
        claim_run_folder(
            RunConfig.load(toy, [output, "train.iterations=5", "attributes.0.target=[.5,.5,0]"])
        )
    assert (folder / "recipe.yaml").read_text() == before


def test_a_run_without_iterations_keeps_no_folder(toy, tmp_path):
    output = f"output={tmp_path / 'run'}"
    claim_run_folder(RunConfig.load(toy, [output]))
    (tmp_path / "run" / "originals").mkdir()
    other = RunConfig.load(toy, [output, "train.seed=1"])
    folder = check_run_folder(other)
    assert RunConfig.load(folder.path / "recipe.yaml") != other  # a check writes nothing
    claim_run_folder(other)
    assert RunConfig.load(folder.path / "recipe.yaml") == other


def test_iterations_may_be_raised(toy, tmp_path):
    output = f"output={tmp_path / 'run'}"
    folder = claim_run_folder(RunConfig.load(toy, [output, "train.iterations=5"])).path
    (folder / "checkpoints" / "step-000005").mkdir(parents=True)
    more = RunConfig.load(toy, [output, "train.iterations=9"])
    claim_run_folder(more)
    assert RunConfig.load(folder / "recipe.yaml") == more


def test_folder_with_something_else_is_refused(toy, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds something else: choose another folder"):
        claim_run_folder(RunConfig.load(toy, [f"output={tmp_path}"]))
    for name in ("thesis.tex", "thesis.tex/run"):
        with pytest.raises(ValueError, match=r"as '.*thesis\.tex' is a file: choose another"):
            claim_run_folder(RunConfig.load(toy, [f"output={tmp_path / name}"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "toy.yaml"]


# ---- without the extra ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yaml", "pydantic"])
def test_missing_extra_names_the_install_command(name):
    code = f"""
import sys, diffusers_fair
sys.modules[{name!r}] = None
try:
    diffusers_fair.RunConfig
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"recipes need '{name}'" in done.stdout
    assert "pip install 'diffusers-fair[train]'" in done.stdout


def test_a_text_encoder_rate_needs_a_trained_text_encoder():
    overrides = ["adapter.components=[unet]", "optimizer.text_encoder_lr=.1"]
    with pytest.raises(ValueError, match=r"components has neither: add one, or set optimizer\.lr"):
        RunConfig.load("testbed-gender", overrides)
    config = RunConfig.load("testbed-gender", ["optimizer.text_encoder_lr=.1"])
    assert config.optimizer.text_encoder_lr == 0.1
