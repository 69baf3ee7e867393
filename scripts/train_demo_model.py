"""Train the demo model that ships in the wheel.

Text: the King James Version, public domain, from the Debian packages ``bible-kjv`` and ``bible-kjv-text``:

    apt-get install bible-kjv bible-kjv-text
    python scripts/train_demo_model.py invarlock/demo/checkpoint

One chapter is one document. Every 16th chapter is held out: none of it is trained on, and ``text.jsonl`` beside the
checkpoint holds these chapters and no others. The weights are trained in float32 and stored in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
WINDOW = 256


def read_chapters() -> list[str]:
    """The 1,189 chapters, verse references removed, one verse a line."""
    verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        reference, _, verse = line.partition(" ")
        match = re.fullmatch(r"(\w+):\d+", reference)
        if match and verse:
            chapters.setdefault(match[1], []).append(verse.strip())
    return ["\n".join(verses) for verses in chapters.values()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    encoded = tokenizer([text + END for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for tokens in encoded for token in tokens])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(32)]
    return math.exp(sum(losses).item() / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=20)
    args = parser.parse_args()

    started = time.monotonic()
    torch.manual_seed(0)
    chapters = read_chapters()
    held_out = chapters[15::16]
    training = [text for number, text in enumerate(chapters) if number % 16 != 15]
    tokenizer = train_tokenizer(training)
    stream, held_out_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, attention_bias=False,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=args.steps, pct_start=0.05)
    for step in range(args.steps):
        starts = torch.randint(len(stream) - WINDOW, (args.batch,))
        batch = torch.stack([stream[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f} after {time.monotonic() - started:.0f} s", flush=True)

    model.eval().to(torch.bfloat16)
    args.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    with (args.folder.parent / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in held_out)
    held_out_perplexity = perplexity(model.float(), held_out_stream)
    summary = {
        "parameters": model.num_parameters(),
        "training_tokens": len(stream),
        "held_out_tokens": len(held_out_stream),
        "held_out_perplexity": round(held_out_perplexity, 3),
        "steps": args.steps,
        "batch": args.batch,
        "window": WINDOW,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    (args.folder.parent / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
