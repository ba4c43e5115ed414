"""Multiple-choice evaluation of a Qwen video-language model: an ordinary script, plus the lines marked "vidtok".

python examples/evaluate.py                                          # tiny random model, sample clips
python examples/evaluate.py --model Qwen/Qwen2.5-VL-3B-Instruct --visual prunevid:tau=0.8
python examples/evaluate.py --questions questions.jsonl              # {"video", "question", "options", "answer"}
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tiny_model import clip, load

import vidtok  # vidtok
from vidtok.data import load_video

SAMPLE = [
    {"video": "bigbuckbunny.mp4", "question": "What animal is this?", "options": ["A rabbit", "A dog"], "answer": "A"},
    {"video": "bikes.mp4", "question": "Where is this?", "options": ["In a kitchen", "In a street"], "answer": "B"},
    {"video": "bikes.mp4", "question": "What do people ride?", "options": ["Horses", "Bicycles"], "answer": "B"},
]


def prompt(item: dict) -> list[dict]:
    options = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(item["options"]))
    question = f"{item['question']}\n{options}\nAnswer with the letter only."
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=Path, help="JSON lines; paths are relative to the file")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--visual", default="uniform:ratio=0.25", help="how to reduce the visual tokens")  # vidtok
    args = parser.parse_args()

    if args.questions is None:
        items = [{**item, "video": clip(item["video"])} for item in SAMPLE]
    else:
        lines = args.questions.read_text().splitlines()
        items = [json.loads(line) for line in lines if line.strip()]
        items = [{**item, "video": args.questions.parent / item["video"]} for item in items]

    model, processor = load(args.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    handle = vidtok.attach(model, visual=args.visual)  # vidtok

    correct, start = 0, time.perf_counter()
    for at in range(0, len(items), args.batch_size):
        batch = items[at : at + args.batch_size]
        texts = [processor.apply_chat_template(prompt(i), add_generation_prompt=True, tokenize=False) for i in batch]
        size = (140, 196) if args.model == "tiny" else None
        videos = [load_video(i["video"], count=args.frames, size=size).frames for i in batch]
        inputs = processor(text=texts, videos=videos, padding=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for item, answer in zip(batch, answers):
            correct += answer.strip()[:1].upper() == item["answer"]
            print(f"{item['video'].name}: {item['question']} -> {answer!r} (expected {item['answer']})")
        print(handle.report())  # vidtok
    print(f"accuracy {correct / len(items):.2f} over {len(items)} questions, {time.perf_counter() - start:.1f} s")
    handle.restore()  # vidtok


if __name__ == "__main__":
    main()
