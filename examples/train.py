"""Fine-tuning of a Qwen video-language model with the Trainer: an ordinary script, plus the lines marked "vidtok".

python examples/train.py                                             # tiny random model, sample clips
python examples/train.py --model Qwen/Qwen2.5-VL-3B-Instruct --visual prunevid:tau=0.8 --decoder attn_14_0.3
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from tiny_model import clip, load
from transformers import Trainer, TrainingArguments

from vidtok.data import load_video
from vidtok.training import TokenReduction  # vidtok

SAMPLE = [
    ("bigbuckbunny.mp4", "What happens?", "A rabbit wakes up in a meadow."),
    ("bikes.mp4", "What happens?", "People cycle along a street."),
    ("bikes.mp4", "What do people ride?", "Bicycles."),
]


class Clips(torch.utils.data.Dataset):
    def __init__(self, repeat: int) -> None:
        self.items = SAMPLE * repeat

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        name, question, answer = self.items[i]
        # Clips of different lengths give rows with different numbers of visual tokens.
        return {
            "frames": load_video(clip(name), count=8 + 4 * (i % 2), size=(112, 140)).frames,
            "question": question,
            "answer": answer,
        }


class Collator:
    def __init__(self, processor) -> None:
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        texts = []
        for item in items:
            user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": item["question"]}]}
            text = self.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
            texts.append(text + item["answer"] + "<|im_end|>")
        inputs = dict(
            self.processor(text=texts, videos=[i["frames"] for i in items], padding=True, return_tensors="pt")
        )
        # Only the answer is learnt; rows are padded on the left, so it stands at the end of each.
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, item in enumerate(items):
            learnt = self.processor.encode(item["answer"] + "<|im_end|>")
            labels[row, -len(learnt) :] = inputs["input_ids"][row, -len(learnt) :]
        inputs["labels"] = labels
        return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", help="where to save the trained model")
    parser.add_argument("--visual", default="prunevid:tau=0.8", help="reduction before the decoder")  # vidtok
    parser.add_argument("--decoder", help="reduction inside the decoder")  # vidtok
    args = parser.parse_args()

    model, processor = load(args.model)
    if args.model != "tiny":
        processor.encode = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    reduction = TokenReduction(visual=args.visual, decoder=args.decoder, log=True)  # vidtok

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=args.output or scratch,
                max_steps=args.steps,
                per_device_train_batch_size=2,
                learning_rate=3e-3 if args.model == "tiny" else 1e-5,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Clips(repeat=8),
            data_collator=Collator(processor),
            callbacks=[reduction],  # vidtok
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} over {len(losses)} steps")
        print(reduction.handle.report())  # vidtok
        if args.output:
            trainer.save_model()


if __name__ == "__main__":
    main()
