"""A pretrained model with another attention, trained until it gives its old answers.

    python convert_and_distill.py                                    # a small teacher made here
    python convert_and_distill.py --model gpt2 --data wikitext-2     # with the Hugging Face Hub

Converts a copy of the model to NSA, compares it with the original before and after distillation,
continues a text, and saves what came out. Without arguments it needs no network: it first trains a
tiny byte-level GPT-2 on the documentation of Python's standard library. Two minutes on a CPU.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnopt
from attnopt.distill import distill
from attnopt.evaluate import evaluate
from attnopt.pretrain import pretrain


def main() -> None:
    """Convert, distill, compare, generate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or Hub id of the teacher")
    parser.add_argument("--data", default="demo", help="what `attnopt distill --data` takes")
    parser.add_argument("--output", type=Path, default=Path("nsa-run"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--teacher-steps", type=int, default=300, help="without --model")
    arguments = parser.parse_args()
    teacher = arguments.model or pretrain("demo", "teacher", steps=arguments.teacher_steps)

    # Conversion alone: in place, exact weights, and back again.
    model = AutoModelForCausalLM.from_pretrained(teacher)
    config = attnopt.NSA(select_block=16, num_selected=2, window=32)
    attnopt.convert(model, config)
    print(f"converted {len(attnopt.mechanisms(model))} layers to {config}")
    attnopt.revert(model)

    # The whole way: a run folder with the student, its history, and the command that made it.
    run = distill(
        teacher, config, arguments.data, arguments.output, max_steps=arguments.steps,
        learning_rate=2e-4, max_train_tokens=200_000, max_eval_tokens=8_192,
    )  # fmt: skip
    scores = evaluate(run, max_tokens=8_192)["models"]
    for name in ("zero-shot", "student"):
        ratio = scores[name]["perplexity_ratio"]
        print(f"{name}: KL {scores[name]['kl']:.4f} nats per token, perplexity ratio {ratio:.3f}")

    # The student is a Hugging Face model like any other.
    student = attnopt.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    prompt = tokenizer("Return the", return_tensors="pt")
    torch.manual_seed(0)
    made = student.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=20)
    print("continued:", repr(tokenizer.decode(made[0])))


if __name__ == "__main__":
    main()
