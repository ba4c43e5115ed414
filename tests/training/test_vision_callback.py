"""Token merging in a vision tower for as long as a Trainer trains."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPForImageClassification, Trainer, TrainingArguments

from vidtok.training import TokenReduction


class Pictures(torch.utils.data.Dataset):
    """Two kinds of noise."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i % 8))
        return {"pixel_values": noise + (2.0 if i % 2 else -2.0), "labels": i % 2}


def classifier():
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config=text, num_labels=2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "vision", ["tome:r=3", "tempme:frames=4,r=2,merge_layers=[1,2],merge_frames=[2,2],output=full"]
)
def test_loss_falls_and_the_model_is_left_as_it_was(vision, smoothing, tmp_path):
    model, seen = classifier(), []
    keys = list(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, label_smoothing_factor=smoothing,
    )  # fmt: skip
    reduction = TokenReduction(vision=vision)
    trainer = Trainer(model, arguments, train_dataset=Pictures(), callbacks=[reduction])
    block = next(m for m in model.modules() if type(m).__name__ == "CLIPEncoderLayer" and m.mlp.fc1.in_features == 32)
    block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]) and max(seen) < 17
    assert list(model.state_dict()) == keys and not reduction.handle.active
    seen.clear()
    model.eval()(pixel_values=torch.zeros(4, 3, 32, 32))
    assert seen == [17]


def test_something_has_to_be_named():
    with pytest.raises(ValueError, match="expected vision=, visual= or decoder="):
        TokenReduction()
