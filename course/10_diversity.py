"""Lesson 10: asked for a story and nothing else, a large model repeats itself; random words make a corpus diverse.

With --model, a large model writes two corpora: `varied`, with random words and features in every prompt, and `naive`,
with the same prompt for every story. The script compares them with each other, with the world and with TinyStories.
"""
import glob
import math

from lesson import CommandLine, prepare, run, run_main, write_world


def main(argv=None):
    parser = CommandLine(__doc__.splitlines()[0])
    parser.option("model", "", "the model that writes, e.g. gpt-4o-mini (default: none; compare what is there)")
    parser.option("base_url", "", "its server, if it is not OpenAI's, e.g. http://localhost:8000/v1")
    parser.option("n", 500, "stories in each of the two corpora", low=1)
    parser.option("price_in", 0.0, "dollars per million tokens of prompts", low=0)
    parser.option("price_out", 0.0, "dollars per million tokens of answers", low=0)
    parser.option("max_cost", math.inf, "dollars that each corpus may cost at most (default: no limit)", low=0)
    args = parser.parse_args(argv)

    write_world("world", n=30_000)
    prepare("world")
    corpora = ["data/world/stories.jsonl", *sorted(glob.glob("data/tinystories/*valid.txt"))]
    if args.model:
        for name, naive in (("varied", False), ("naive", True)):
            run("generate.py", name=name, naive=naive, **vars(args))
            corpora.append(f"data/{name}/stories.jsonl")
    run("lab.corpus", *corpora)


if __name__ == "__main__":
    run_main(main)
