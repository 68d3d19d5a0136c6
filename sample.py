"""Write stories with a trained model.

    python sample.py --prompt="Once upon a time"                      one story by the newest run, as it is written
    python sample.py --num_samples=8 --temperature=1                  eight at once
    python sample.py --interactive                                    type beginnings; the model continues them
    python sample.py --serve=8000                                     answer other programs, as OpenAI's API does
    python sample.py --words="run, dog, red" --features="dialogue"    for a model trained with prepare.py --instruct
    python sample.py --words="run, dog, red" --best_of=16             the one of 16 stories that follows this best

A model gives a probability to every token that could come next. `pick` draws one of them, and `generate` repeats
this until <|endoftext|> is drawn. Then come two ways to do that faster, on a GPU and on a CPU, and at last stories,
as text instead of tokens.
"""
# first, so that an old Python, or Ctrl-C while the rest is imported, ends in one line
from common import CommandLine, run_main

import sys
from codecs import getincrementaldecoder
from functools import partial

import torch
from tqdm import tqdm

from common.dataset import instruction
from common.device import pick_device
from common.records import EOT, details
from common.runs import load_run, newest_run
from model import GPT, Cache


# -----------------------------------------------------------------------------------------------------------------
# drawing tokens. Each new token is one forward pass: the cache holds the keys and values of all tokens before it.


def pick(logits, draws, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Token ids (B,) from logits (B, V): the likeliest at temperature 0, else drawn by `draws` (B,) from [0, 1).

    Of the probabilities we keep the `top_k` largest (0: all), the largest that together reach `top_p` (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751), and those of at least `min_p` times the largest (Nguyen et al.
    2024, arXiv 2407.01082)."""
    if temperature < 1e-3:  # 0, or so little that its share of the next token cannot be told from it
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_k:
        smallest_kept = p.topk(min(top_k, p.size(-1))).values[:, -1:]
        p = p.where(p >= smallest_kept, 0)
    if top_p < 1:
        sorted_p, ids = p.sort(descending=True)
        sum_before = sorted_p.cumsum(-1) - sorted_p
        p = p.scatter(-1, ids, sorted_p.where(sum_before < top_p * sorted_p.sum(-1, keepdim=True), 0))
    if min_p:
        p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    # inverse transform sampling: the first token at which the cumulative probability exceeds the draw
    cumulative = p.cumsum(-1)
    threshold = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=p.size(-1) - 1)


@torch.inference_mode()
def generate(model, ids, max_tokens, seeds, eot, **settings):
    """Yield the next token ids (B,) of B = len(seeds) continuations of `ids`, (T,) or (B, T), until all have ended.

    A continuation ends with `eot`, which it then repeats. Each draws from a seed of its own, so that a story does not
    depend on the batch it is written in. When the context is full, or the prompt is longer, its second half is read
    again, and the first is forgotten. settings: see `pick`."""
    device, block_size = model.head.weight.device, model.config.block_size
    # text: all tokens so far; unread: those that the model has not seen yet, at first all of them, later the newest one
    text = torch.tensor(ids, device=device).expand(len(seeds), -1)  # (B, T)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(max_tokens, generator=g) for g in generators]).to(device)  # (B, max_tokens)
    graphed_step = reuse_graphs(model, len(seeds), settings)  # None without a GPU
    cache = graphed_step.cache if graphed_step else Cache(model, len(seeds))
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    unread = text
    for i in range(max_tokens):
        if cache.length + unread.size(1) > block_size:
            cache.length = 0
            unread = text[:, -max(1, block_size // 2):]
        if graphed_step and cache.length:  # not the prompt, nor what is read again
            token = graphed_step(unread, draws[:, i])
        else:
            token = pick(model(unread, cache=cache)[:, -1], draws[:, i], **settings)
        token = torch.where(ended, eot, token)  # the batch goes on until its longest story has ended
        ended |= token == eot
        yield token
        if ended.all():
            return
        unread = token[:, None]
        text = torch.cat((text, unread), dim=1)


class GraphedStep:
    """A step of `generate` as CUDA graphs: from the last tokens of B stories to the next ones, (B,).

    Python launches about 300 kernels per step, and that takes longer than running them. A CUDA graph records them once,
    and then launches all of them with one call. Whatever model.py computes is recorded, so a changed model is followed.

    A replay repeats the same kernels on the same memory, and knows nothing of Python's variables. So the inputs and the
    position are copied into tensors that stay where they are. The number of keys is fixed too: one graph serves
    positions 0 to 63 and reads 64 keys, the next one serves 64 to 127 and reads 128, and so on. Keys of later positions
    are masked."""

    def __init__(self, model, batch_size, settings, record=None, graph_keys=64):
        """record(step) calls step() and returns a function that replays it; by default record_cuda_graph."""
        self.model, self.settings, self.graph_keys = model, settings, graph_keys
        self.record = record or record_cuda_graph
        self.cache, device = Cache(model, batch_size), model.head.weight.device
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.draws = torch.zeros(batch_size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.next_token = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.replays = {}  # {number of keys: function that replays the graph}

    def __call__(self, token, draws):
        cache, length = self.cache, self.cache.length
        self.token.copy_(token)
        self.draws.copy_(draws)
        self.position.fill_(length)
        n_keys = min((length // self.graph_keys + 1) * self.graph_keys, self.model.config.block_size)
        if n_keys not in self.replays:
            cache.position, cache.max_keys = self.position, n_keys  # from here on, the memory of self.position counts
            last_embedding = cache.last_embedding.clone()
            self.replays[n_keys] = self.record(self.step)
            cache.last_embedding.copy_(last_embedding)  # recording took a step, which must not count
            cache.position = None  # other calls of the model read cache.length instead
        self.replays[n_keys]()
        cache.length = length + 1
        return self.next_token.clone()

    def step(self):
        """What is recorded: the tokens in self.token become those in self.next_token."""
        length = self.cache.length
        logits = self.model(self.token, cache=self.cache)[:, -1]
        self.next_token.copy_(pick(logits, self.draws, **self.settings))
        self.cache.length = length


def record_cuda_graph(step):
    """Record the kernels that step() launches, and return a function that launches them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # libraries initialize on their first call, which cannot be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def reuse_graphs(model, batch_size, settings):
    """The GraphedStep of the last call of `generate` if it fits this one, else a new one; None where
    the model is not on a GPU with CUDA, or is no GPT of model.py."""
    if model.head.weight.device.type != "cuda" or not isinstance(model, GPT):
        return None
    key = (batch_size, model.head.weight.dtype, settings)
    if getattr(model, "graphed_step", (None, None))[0] != key:
        model.graphed_step = key, GraphedStep(model, batch_size, settings)
    graphed_step = model.graphed_step[1]
    graphed_step.cache.length = 0
    return graphed_step


def speed_up_single_rows(model):
    """Make the matrix products of a float32 model on a CPU faster where one story is written, token by token.

    When torch multiplies a weight by a single row, it uses only a fraction of the memory's bandwidth. The
    same product as a batch of two halves reads the weight up to four times as fast. Only plain nn.Linear layers are
    changed, and only in how they compute, so this works for any model.py."""
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.bias is None and layer.out_features % 2 == 0:
            layer.forward = single_row_forward(layer)


def single_row_forward(layer):
    """A forward function for one linear layer, which multiplies in halves if it is given a single row."""
    any_rows = layer.forward
    halves = layer.weight.detach().view(2, -1, layer.in_features)  # a view: nothing is copied

    def forward(x):
        if x.numel() != layer.in_features:
            return any_rows(x)
        row = x.reshape(1, 1, -1).expand(2, -1, -1)  # (2, 1, in_features)
        return torch.bmm(halves, row.transpose(1, 2)).view(*x.shape[:-1], -1)
    return forward


# -----------------------------------------------------------------------------------------------------------------
# stories


def write_stories(model, encoding, prompt, max_tokens, seeds, **settings):
    """One story per seed that begins with `prompt`, as lists of token ids without <|endoftext|>."""
    ids = [encoding.eot_token] + encoding.encode_ordinary(prompt)
    columns = list(generate(model, ids, max_tokens, seeds, encoding.eot_token, **settings))
    rows = torch.stack(columns, dim=1).tolist()
    return [ids[1:] + [token for token in row if token != encoding.eot_token] for row in rows]


def print_stories(model, encoding, prompt, seeds, best_of, choose, **settings):
    """Print stories, separated as in a corpus, each batch as soon as it has ended: one for every `best_of` seeds, which
    choose(list of texts) returns."""
    at_once = max(1, max_batch(model) // best_of) * best_of
    starts = range(0, len(seeds), at_once)
    separator = ""
    for start in tqdm(starts, "batches", leave=False, disable=None if len(starts) > 1 else True):
        batch = write_stories(model, encoding, prompt, seeds=seeds[start:start + at_once], **settings)
        stories = [encoding.decode(ids) for ids in batch]
        for i in range(0, len(stories), best_of):
            tqdm.write(separator + (choose(stories[i:i + best_of]) if best_of > 1 else stories[i]))
            separator = EOT + "\n"


def choose_best(stories, fields, instructions):
    """Of several stories, the one that follows its instructions best. Says on stderr how much of them it has."""
    from lab.label import followed, share_followed  # only here: the stages do without the laboratory
    best = max(stories, key=lambda story: share_followed(fields, story.removeprefix(instructions)))
    counts = followed(fields, best.removeprefix(instructions))
    has = ", ".join(f"{count} of {total} ({name})" for name, (count, total) in counts.items() if total)
    print(f"the best of {len(stories)} has {has or 'nothing that can be counted'}", file=sys.stderr)
    return best


def max_batch(model):
    """How many stories are written at once. On a CPU, four times as many are 1.3 times as fast, but the first of them
    come later; on a GPU, their caches may take 2 GB."""
    c, weight = model.config, model.head.weight
    if weight.device.type != "cuda":
        return 64
    return max(1, 2**31 // (2 * c.n_layer * c.n_embd * c.block_size * weight.element_size()))


def write_story(model, encoding, prompt, max_tokens, seed, **settings):
    """Yield the text that each token adds to a story, as it is written."""
    ids = [encoding.eot_token] + encoding.encode_ordinary(prompt)
    decoder = getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    for token in generate(model, ids, max_tokens, [seed], encoding.eot_token, **settings):
        if token.item() != encoding.eot_token:
            yield decoder.decode(encoding.decode_single_token_bytes(token.item()))
    if rest := decoder.decode(b"", final=True):  # a character that was not finished
        yield rest


def stream_story(model, encoding, prompt, **settings):
    """Print one story as it is written."""
    print(prompt, end="", flush=True)
    for text in write_story(model, encoding, prompt, **settings):
        print(text, end="", flush=True)
    print()


def chat(model, encoding, instructions, settings, parser):
    """Read beginnings from the terminal and continue them. A line like /temperature=0.5 changes a setting."""
    print("Type the beginning of a story, and the model continues it. An empty line lets the model begin.\n"
          "/temperature=0.5 changes a setting, / shows them all, /quit or Ctrl-C ends.")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 would end the program
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            change_setting(line[1:].strip(), settings, parser)
            continue
        try:
            stream_story(model, encoding, instructions + line.rstrip(), **settings)
        except KeyboardInterrupt:  # ends this story, not the program
            print()
        settings["seed"] += 1  # otherwise the same beginning would always get the same story


def change_setting(text, settings, parser):
    """Change one of the settings from "name=value" or "name value", or show them all if the text is empty."""
    name, _, value = text.replace("=", " ").partition(" ")
    if not name:
        print("  ".join(f"/{key}={current}" for key, current in settings.items()))
        return
    try:
        value = type(settings[name])(value)  # int or float, as the setting is now
    except (KeyError, ValueError):
        print(f"/{text} is not a setting: type /temperature=0.5, for example, or another of {', '.join(settings)}")
        return
    problem = parser.problem(name, value)
    if not problem:
        settings[name] = value
    print(problem.removeprefix("--") or f"{name} is {value}")


# -----------------------------------------------------------------------------------------------------------------
# the command line


def command_line():
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default="", help="its folder, or a checkpoint in it (default: the newest)")
    parser.option("out_dir", "", "another way to name the run, as with train.py")
    parser.option("prompt", "", "how the stories begin")
    parser.option("num_samples", 1, "number of stories, written in batches", low=1)
    parser.option("max_tokens", 500, "length limit of a story", low=1, high=1_000_000)
    parser.option("temperature", 0.8, "0 always takes the likeliest token, 1 draws by the model's probabilities", low=0)
    parser.option("top_k", 0, "draw from the k likeliest tokens only; 0 means all", low=0)
    parser.option("top_p", 1.0, "draw from the likeliest tokens that together have this probability", low=0.01,
                  high=1)
    parser.option("min_p", 0.0, "draw from tokens of at least this share of the highest probability", low=0, high=1)
    parser.option("words", "", "words to use: a verb, a noun, an adjective, for a model trained on instructions")
    parser.option("features", "", "features such as dialogue, for a model trained on instructions")
    parser.option("summary", "", "what happens, for a model trained on instructions")
    parser.option("best_of", 1, "write so many stories for each that is shown: the one that has most of --words, "
                  "--summary and, of --features, dialogue, bad ending and moral value", low=1)
    parser.option("serve", 0, "answer other programs at this port of this machine, as OpenAI's API does, e.g. 8000",
                  low=0, high=65535)
    parser.option("interactive", False, "type beginnings; the model continues them")
    parser.option("seed", 1, "of the first story; the next one has the next seed", low=0)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "float32", "16 bits are faster for many stories, where the device is fast at them",
                  choices=("float32", "bfloat16", "float16"))
    return parser


def read_instructions(args, checkpoint):
    """({field: text} of the instructions, and what stands before the story: "" if the model has not learned any)."""
    known = details({name: getattr(args, name) for name in ("features", "words", "summary")})  # as in training
    fields = {name: value if isinstance(value, str) else ", ".join(value) for name, value in known.items() if value}
    instructed = checkpoint.get("instruct")  # whether its stories had instructions; None if the checkpoint is older
    if fields and instructed is False:
        sys.exit(f"this model has not learned instructions: leave out --{next(iter(fields))}, or train a model on a "
                 "dataset made with prepare.py --instruct")
    return fields, (instruction(fields) if fields or instructed else "")


def main(argv=None):
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        (args.prompt + args.words + args.features + args.summary).encode()
    except UnicodeEncodeError:
        sys.exit("--prompt or an instruction is not UTF-8: set the terminal to UTF-8")
    prompt = args.prompt.rstrip()  # a token holds the space before a word, so the model writes it itself
    n_stories = args.num_samples * args.best_of
    if (args.interactive or args.serve) and (prompt or n_stories > 1 or args.interactive and args.serve):
        sys.exit("--interactive and --serve ask for each beginning: leave out --prompt, --num_samples, --best_of and "
                 "the other of the two")
    if args.best_of > 1 and not (args.words or args.features or args.summary):
        sys.exit("--best_of chooses by instructions: add --words, --features or --summary, or leave it out")
    device, dtype = pick_device(args.device, args.dtype)
    if args.run and args.out_dir:
        sys.exit(f"name the run once: leave out {args.run} or --out_dir={args.out_dir}")
    run = args.run or args.out_dir or newest_run()
    model, checkpoint, encoding = load_run(run, device)
    model = model.to(dtype)
    fields, instructions = read_instructions(args, checkpoint)
    settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "max_tokens")}
    if n_stories == 1 and device.type == "cpu" and dtype == torch.float32:
        speed_up_single_rows(model)
    if args.serve:
        from lab.serve import serve  # only here: it imports this file
        serve(args.serve, run, model, encoding, instructions, {**settings, "seed": args.seed})
    elif args.interactive:
        chat(model, encoding, instructions, {**settings, "seed": args.seed}, parser)
    elif n_stories == 1:
        stream_story(model, encoding, instructions + prompt, seed=args.seed, **settings)
    else:
        choose = partial(choose_best, fields=fields, instructions=instructions)
        print_stories(model, encoding, instructions + prompt, range(args.seed, args.seed + n_stories), args.best_of,
                      choose, **settings)


if __name__ == "__main__":
    run_main(main, lower="--num_samples or --best_of")
