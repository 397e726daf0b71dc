import pytest
import torch
from open_clip import tokenize
from pictures import held_out
from torch.nn import functional as F

from diffusers_fair.prompts import prompt_set
from diffusers_fair.testbed import judges, world
from diffusers_fair.testbed.models import VOCABULARY
from diffusers_fair.testbed.tokenizer import tokenizer
from diffusers_fair.testbed.vocabulary import pack, table_rows, unpack
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels
from diffusers_fair.vision.faces import face_chips

ENCODERS = {"clip": judges.clip, "dino": judges.dino, "face": judges.face_embedder}


def test_pixels_resize_and_rescale():
    pixels = Pixels(8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert torch.allclose(pixels(torch.ones(1, 3, 16, 16))[0, :, 0, 0], torch.tensor([1.0, 3, 1]))
    assert pixels(torch.ones(1, 3, 16, 12)).shape == (1, 3, 8, 8)
    assert torch.equal(Pixels(4)(torch.full((1, 3, 4, 4), 0.25)), torch.full((1, 3, 4, 4), 0.25))


def test_network_encoder_gives_unit_length():
    encode = NetworkEncoder(lambda x: x.mean((2, 3)), Pixels(4))
    features = encode(torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(features.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("name", list(ENCODERS))
def test_testbed_encoder(name):
    encode = ENCODERS[name]()
    pictures = held_out("portrait", 12)[0]
    if name == "face":
        pictures = face_chips(pictures, judges.face_detector()(pictures), judges.CHIP)
    x = pictures.clone().requires_grad_()
    features = encode(x)
    assert torch.allclose(features.norm(dim=1), torch.ones(12), atol=1e-5)
    (gradient,) = torch.autograd.grad((features[:6] * features[6:]).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()
    with torch.no_grad():
        larger = encode(F.interpolate(pictures, (128, 128), mode="bicubic"))
        others = features @ features.T
    assert ((larger * features).sum(1) > 0.9).all()
    assert others[~torch.eye(12, dtype=torch.bool)].mean() < 0.7


def test_clip_knows_the_family_of_an_occupation():
    clip, facts = judges.clip(), world.families()
    pictures, labels = held_out("portrait", 200)
    names = list(facts)
    texts = clip.texts([world.NEUTRAL.format(facts[f]["occupations"][0]) for f in names])
    guess = (clip(pictures) @ texts.T).argmax(1)
    right = [names[i] == f for i, f in zip(guess, labels["family"], strict=True)]
    assert sum(right) / len(right) >= 0.8


def test_clip_reads_the_same_however_many_texts():
    clip, texts = judges.clip(), ["a photo of the face of a chef, a person", "", "two bakers"]
    alone = torch.cat([clip.texts([t]) for t in texts])
    assert torch.allclose(clip.texts(texts), alone, atol=1e-5)


def test_tokenizer_gives_the_numbers_of_clip():
    known = prompt_set("testbed-occupations")
    texts = [*known.prompts("train"), *known.prompts("test"), "", "don't stop 8K art!! (x_y) 1970s"]
    ids = tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = tokenize(texts)  # filled up with zeros
    ended = (theirs == VOCABULARY - 1).cumsum(1) > 0
    assert torch.equal(ids, theirs.masked_fill(ended, VOCABULARY - 1))


def test_tokenizer_cuts_long_prompts_to_77():
    ids = tokenizer()(["chef " * 100], truncation=True).input_ids[0]
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (49406, 49407)


def test_packed_words_come_back(tmp_path):
    used = torch.tensor([3, 7, 20])
    model = torch.nn.Module()
    model.token_embedding = torch.nn.Embedding(3, 4)
    pack(model, used, tmp_path / "words.safetensors", {"note": "three"})
    table = unpack(tmp_path / "words.safetensors", 30)["token_embedding.weight"]
    again = unpack(tmp_path / "words.safetensors", 30)["token_embedding.weight"]
    small = model.token_embedding.weight.detach()
    assert table.shape == (30, 4)
    assert torch.equal(table, again)
    assert torch.allclose(table[used], small, atol=1e-2)
    ids = torch.tensor([[7, 20], [3, 3]])
    assert torch.allclose(table[ids], small[table_rows(used, ids)], atol=1e-2)
    assert table[0].abs().max() < 0.2
