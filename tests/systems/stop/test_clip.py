"""The backbone against transformers' CLIP, from checkpoints in both forms."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from vidtok.systems.stop import CLIP4Clip, load, read, save, tiny
from vidtok.systems.stop.checkpoint import Weights

TEXT = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 20, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
HEADS = {"vision_heads": 4, "text_heads": 2}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=48)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(6 if "q_proj" in name or "k_proj" in name else 2.5)
            elif "norm" in name or "bias" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model


def original_form(model) -> dict[str, torch.Tensor]:
    """The same weights by the names of the original release, one by one."""
    state = model.state_dict()
    out = {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].t().contiguous(),
        "text_projection": state["text_projection.weight"].t().contiguous(),
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "logit_scale": state["logit_scale"],
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(20),
        "vocab_size": torch.tensor(99),
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for ours, tower, layers in (("visual.transformer", "vision_model", 2), ("transformer", "text_model", 3)):
            for i in range(layers):
                to, of = f"{ours}.resblocks.{i}", f"{tower}.encoder.layers.{i}"
                out[f"{to}.ln_1.{kind}"] = state[f"{of}.layer_norm1.{kind}"]
                out[f"{to}.ln_2.{kind}"] = state[f"{of}.layer_norm2.{kind}"]
                out[f"{to}.mlp.c_fc.{kind}"] = state[f"{of}.mlp.fc1.{kind}"]
                out[f"{to}.mlp.c_proj.{kind}"] = state[f"{of}.mlp.fc2.{kind}"]
                out[f"{to}.attn.out_proj.{kind}"] = state[f"{of}.self_attn.out_proj.{kind}"]
                out[f"{to}.attn.in_proj_{kind}"] = torch.cat([state[f"{of}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
    return out


def captions() -> torch.Tensor:
    ids = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate((4, 11, 7)):
        ids[row, end] = 98
        ids[row, end + 1 :] = 1
    return ids


def test_equals_transformers(theirs):
    model = CLIP4Clip(None, theirs.state_dict(), HEADS).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = theirs(input_ids=captions(), pixel_values=images)
        for got, want in (
            (model.encode_text(captions()), out.text_embeds),
            (model.encode_video(images[:, None]), out.image_embeds),
            (model.clip.encode_image(images), theirs.visual_projection(theirs.vision_model(images).pooler_output)),
        ):
            assert (got - want).norm() <= 1e-5 * want.norm()
        logits = model.get_similarity_logits(
            *model.get_sequence_visual_output(captions(), None, None, images[:, None]), video_mask=torch.ones(3, 1)
        )[0]
        torch.testing.assert_close(logits, out.logits_per_text, rtol=1e-5, atol=1e-4)


def test_both_forms_are_the_same(theirs):
    one = CLIP4Clip(None, theirs.state_dict(), HEADS).state_dict()
    two = CLIP4Clip(None, original_form(theirs), HEADS).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Names of data-parallel training, and of CLIP inside CLIP4Clip.
    three = {f"module.clip.{name}": value for name, value in original_form(theirs).items() if value.dim()}
    three["module.clip.logit_scale"] = theirs.logit_scale
    three = CLIP4Clip(None, three, HEADS).state_dict()
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_sizes_follow_from_the_weights(theirs):
    sizes = Weights.of(original_form(theirs)).sizes()
    assert (sizes.image, sizes.patch, sizes.vision_width, sizes.vision_layers, sizes.vision_heads) == (32, 8, 128, 2, 2)
    assert (sizes.context, sizes.vocabulary, sizes.text_width, sizes.text_layers) == (20, 99, 64, 3)
    assert (sizes.text_heads, sizes.embed, sizes.grid) == (1, 48, 4)


@pytest.mark.parametrize("form", ["original", "transformers"])
def test_keys_are_checked(theirs, form):
    state = dict(theirs.state_dict() if form == "transformers" else original_form(theirs))
    del state["vision_model.post_layernorm.bias" if form == "transformers" else "visual.ln_post.bias"]
    state["extra.weight"] = torch.zeros(1)
    name = "vision_model.post_layernorm.bias" if form == "transformers" else "visual.ln_post.bias"
    with pytest.raises(ValueError, match=f"got one without {name} and with the unexpected extra.weight"):
        CLIP4Clip(None, state, HEADS)


def test_ten_keys_are_named(theirs):
    state = {name: value for name, value in original_form(theirs).items() if ".mlp." not in name}
    with pytest.raises(ValueError) as caught:
        CLIP4Clip(None, state, HEADS)
    assert str(caught.value).count(".mlp.") == 10 and "and 10 more" in str(caught.value)
    state = dict(theirs.state_dict())
    del state["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"without text_model.encoder.layers.1.self_attn.k_proj.weight$"):
        CLIP4Clip(None, state, HEADS)


def test_wrong_checkpoints_are_refused(theirs):
    with pytest.raises(ValueError, match=r"CLIP with a vision transformer.*without .*visual.class_embedding"):
        CLIP4Clip(None, {"visual.conv1.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(ValueError, match="expected a state dict of tensors, got list"):
        CLIP4Clip(None, [1])
    state = original_form(theirs)
    state["ln_final.weight"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"expected ln_final.weight of shape \[64\], got \[7\]"):
        CLIP4Clip(None, state, HEADS)
    state = tiny(temporal_prompt="DGL").state_dict()
    with pytest.raises(ValueError, match="unexpected stop"):
        CLIP4Clip(None, state, {"vision_heads": 4, "text_heads": 4})


def test_files(theirs, tmp_path):
    state = original_form(theirs)
    torch.save(state, tmp_path / "a.pt")
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": VISION, "text_config": TEXT}))
    one, two = load(tmp_path / "a.pt", **HEADS), load(tmp_path, tome_r=1)
    assert two.tome is not None and two.sizes == one.sizes
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_the_release_is_an_archive_of_a_script(theirs, tmp_path):
    module = torch.nn.Module()
    for name, value in (("weight", torch.ones(2)), ("bias", torch.zeros(1))):
        module.register_parameter(name, torch.nn.Parameter(value))
    torch.jit.script(module).save(str(tmp_path / "ViT.pt"))
    assert zipfile.is_zipfile(tmp_path / "ViT.pt")
    assert torch.equal(read(tmp_path / "ViT.pt")["weight"], torch.ones(2))


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"a": Evil()}, tmp_path / "a.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("prompt", ["none", "DGL", "group2-2"])
def test_saved_models_come_back(prompt, tmp_path):
    model = tiny(temporal_prompt=prompt, tome_r=2, frame_prompts=3, seed=1).eval()
    save(model, tmp_path)
    again = load(tmp_path).eval()
    assert again.config == model.config and again.sizes == model.sizes
    video = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encode_video(video), model.encode_video(video))
    assert load(tmp_path, tome_r=0).tome is None
    with pytest.raises(ValueError, match="expected settings among"):
        load(tmp_path, tome_f=0)


def test_names_of_the_release_are_those_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache/clip").mkdir(parents=True)
    torch.save(tiny(seed=0).clip.state_dict(), tmp_path / ".cache/clip/ViT-L-14-336px.pt")
    assert load("ViT-L/14@336px", vision_heads=4, text_heads=4).sizes.patch == 8


@pytest.mark.parametrize("there", ["model.safetensors", "pytorch_model.bin"])
def test_the_hubs_cache_is_looked_in_and_nothing_is_downloaded(tmp_path, monkeypatch, there):
    state = tiny(seed=0).clip.state_dict()

    def reached(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # As where the hub can be reached.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.setattr("socket.getaddrinfo", reached)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", reached)
    with pytest.raises(ValueError, match=r"that this machine holds \(nothing is downloaded\), got 'ViT-B/32'"):
        load("ViT-B/32")
    kept = tmp_path / "hub/models--openai--clip-vit-base-patch32"
    (kept / "snapshots/abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    (save_file if there.endswith("tensors") else torch.save)(state, kept / "snapshots/abc" / there)
    for name in ("ViT-B/32", "openai/clip-vit-base-patch32"):
        assert load(name, vision_heads=4, text_heads=4).sizes.patch == 8


def test_names_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="expected a path that exists, or one of ViT-B/32"):
        load("ViT-Q")
    with pytest.raises(ValueError, match="expected a path that exists"):
        load("models/missing.pt")
    for name in ("a/b-1.5", "a/b/c", "a/..", "/a"):
        with pytest.raises(ValueError, match=r"a repository of the hub that this machine holds .*, got '"):
            load(name)
    with pytest.raises(ValueError, match=r"model.safetensors or pytorch_model.bin in .*, got neither"):
        load(tmp_path)
