"""What a step needs, by formulas: bytes of GPU memory and seconds, from a model's shape and flags.

The bytes are those that tests/meta_memory.py counts, within 20%: the peak of live tensors. Seconds
are a card's attained rates times what is multiplied and moved. No GPU has run this."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple


GIB = 2 ** 30

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "tie_word_embeddings", "vocab_size")

# The released dense models, by their config.json files.
QWEN3 = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, True, 151936),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, True, 151936),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, True, 151936),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, False, 151936),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 128, False, 151936),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, 128, False, 151936)}

REAL_TOKENS = 151669             # of Qwen3's tokenizer; the rows above are padding

CHUNK = 2 ** 26                  # logits computed at a time on a GPU (model.chunk_size)

NF4_BYTES = 4.127 / 8            # a weight (methods/nf4.py)


# ---- Shapes --------------------------------------------------------------------------------------

def shape_of(name):
    """The configuration of one of QWEN3."""
    return SimpleNamespace(**dict(zip(FIELDS, QWEN3[name])), attention_bias=False)


def widths(c):
    """(hidden h, inner i, all query heads q, all key heads kv) in numbers."""
    return (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim,
            c.num_key_value_heads * c.head_dim)


def block_numbers(c):
    """Weights of one block's linear layers."""
    h, i, q, kv = widths(c)
    return 2 * h * q + 2 * h * kv + 3 * h * i


def bias_numbers(c):
    """Biases of one block, which stay as they are under --nf4."""
    h, _, q, kv = widths(c)
    return (q + 2 * kv + h) * c.attention_bias


def embedding_numbers(c):
    """Weights of the embedding and of the head, where that is another matrix."""
    return c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)


def adapter_numbers(c, rank):
    """What a LoRA on every linear layer trains."""
    h, i, q, kv = widths(c)
    ends = (h + q) + 2 * (h + kv) + (q + h) + 3 * (h + i)
    return rank * ends * c.num_hidden_layers


def frozen_bytes(c, itemsize=2, nf4=False, shards=1):
    """Bytes of the frozen weights on one rank; shards: the ranks that share the blocks."""
    blocks = c.num_hidden_layers * block_numbers(c)
    blocks *= NF4_BYTES if nf4 else itemsize
    blocks += c.num_hidden_layers * bias_numbers(c) * itemsize
    whole = embedding_numbers(c) * itemsize
    if shards > 1:                           # a block is put together while the last one is in use
        return whole + blocks / shards + 2 * block_numbers(c) * itemsize
    return whole + blocks


# ---- Memory --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Load:
    """What one rank does in a step, as far as memory and time depend on it. Tokens are padded ones;
    a `row` holds a prompt and its completions."""
    train_tokens: int            # of all training passes of the step
    pass_tokens: int             # of the largest pass
    row: int                     # of its rows
    shared: bool                 # do rows hold several completions?
    predicted: int = 0           # tokens of that pass that are projected to the vocabulary
    prompts: int = 0             # that get k completions
    places: int = 0              # prompts that are sampled at a time
    k: int = 1
    prompt: int = 0              # tokens of a prompt
    new_tokens: int = 0          # of the longest completion
    embedded: int = 0            # tokens that are embedded at a time
    adapter: int = 0             # numbers that train
    rank: int = 16
    copies: int = 0              # of the adapter: phase two's start; a gradient that waits
    itemsize: int = 2            # bytes of a weight and of an activation
    nf4: bool = False
    checkpointing: bool = False
    graphs: bool = True          # is the batch of completions kept between rollouts?
    shards: int = 1              # ranks that share the blocks' weights
    vocab: int = REAL_TOKENS

    @property
    def rows(self):
        """Completions sampled at a time."""
        return self.places * self.k

    def embedding(self, most):
        """The same with its completions embedded, at most so many tokens at a time."""
        tokens = self.prompts * self.k * self.new_tokens
        return replace(self, embedded=min(tokens, most))

    def recomputing(self, checkpointing):
        """The same with or without --checkpointing."""
        return replace(self, checkpointing=checkpointing)


class Memory(NamedTuple):
    """Bytes on one rank."""
    weights: float               # frozen
    training: float              # adapter, gradient, Adam, copies: all in fp32
    cache: float                 # what sampling keeps from step to step
    work: float                  # the largest of a training pass, a decoding step, embedding

    @property
    def total(self):
        return sum(self)


def memory(c, load, weights=None):
    """The Memory of a step of this Load; weights: the frozen ones' bytes where they are known."""
    if weights is None:
        weights = frozen_bytes(c, load.itemsize, load.nf4, load.shards)
    training = (16 + 4 * load.copies) * load.adapter
    cache = cache_bytes(c, load)
    decoding = decoding_bytes(c, load)
    if not load.graphs:                      # freed before the passes
        cache, decoding = 0, cache + decoding
    work = max(pass_bytes(c, load), decoding, reading_bytes(c, load, load.embedded))
    return Memory(weights, training, cache, work)


def kept_bytes(c, load):
    """Bytes a token that one block keeps for its backward pass."""
    h, i, q, kv = widths(c)
    keys = q if load.shared else kv          # a kernel with a mask wants keys for every head
    norms = 4 * (2 * h + q + kv)             # their inputs in fp32
    products = load.itemsize * (2 * h + 2 * q + 2 * keys + 4 * i + 7 * load.rank)
    mask = load.itemsize * load.row if load.shared else 0
    return norms + products + 4 * c.num_attention_heads + mask


def dense_bytes(c, load):
    """The largest NF4 weight while it is made dense: codes as int32, values twice in fp32."""
    largest = c.hidden_size * max(c.intermediate_size, c.num_attention_heads * c.head_dim)
    return load.nf4 * largest * 10


def pass_bytes(c, load):
    """Bytes of a forward and backward pass: what blocks keep, then logits in chunks, or one block's
    gradients."""
    h, i, q, kv = widths(c)
    tokens = load.pass_tokens
    kept = tokens * kept_bytes(c, load)
    ends = tokens * (2 * load.itemsize + 4) * h            # states, their gradients, the last norm
    mask = tokens * load.row if load.shared else 0
    logits = (10 + load.itemsize) * min(CHUNK, load.predicted * load.vocab)
    gradients = tokens * load.itemsize * 2 * (i + h) + dense_bytes(c, load)
    if load.checkpointing:
        inputs = tokens * load.itemsize * h * c.num_hidden_layers
        return inputs + ends + mask + max(logits, kept + gradients)
    adapters = 2 * load.adapter
    return kept * c.num_hidden_layers + adapters + ends + mask + max(logits, gradients)


def cache_bytes(c, load):
    """Keys and values of the prompts and of the completions, and the adapter's joined factors."""
    h, i, q, kv = widths(c)
    width = -(-load.prompt // 64) * 64
    tokens = load.places * width + load.rows * load.new_tokens
    tables = 20 * load.rows * (load.new_tokens + 1)
    joined = load.rank * (3 * h + q + 2 * h + i + 3 * (q + 2 * kv) + h + 2 * 2 * i + h)
    factors = load.itemsize * joined * c.num_hidden_layers if load.places else 0
    return 2 * load.itemsize * kv * c.num_hidden_layers * tokens + tables + factors


def decoding_bytes(c, load):
    """Bytes of a decoding step: logits, probabilities and their sums; of reading the prompts."""
    if not load.places:
        return 0
    seen = -(-load.prompt // 64) * 64 + load.new_tokens
    scores = load.rows * c.num_attention_heads * seen * (8 + 2 * load.itemsize)
    logits = load.rows * load.vocab * (8 + load.itemsize)
    step = max(scores, logits, dense_bytes(c, load))
    prompts = min(load.places * load.prompt, max(2 ** 14, load.prompt))
    return max(step, reading_bytes(c, load, prompts))


def reading_bytes(c, load, tokens):
    """Bytes of a pass without gradient."""
    h, i, _, _ = widths(c)
    return tokens * (load.itemsize * (3 * i + 2 * h) + 4 * h) + dense_bytes(c, load) * bool(tokens)


# ---- Time ----------------------------------------------------------------------------------------

class Card(NamedTuple):
    """A GPU by what its steps attain: memory in GiB, products in FLOP/s, moved and received bytes/s
    (LINK: from other GPUs)."""
    name: str
    gib: float
    products: float
    moved: float
    link: float


LINK = 200e9                     # bytes a second that a GPU receives over NVLink, attained

ATTAINED = 0.4                   # of a data sheet's bf16 products and of its memory bandwidth

NF4_MOVED = 2.6                  # bytes moved for a weight that is made dense, with Triton

KERNELS = 21                     # of a block in a decoding step with LoRA, counted, with Triton

KERNEL_SECONDS = 2.5e-6          # that a small one takes in a CUDA graph, assumed


def step_seconds(c, load, card):
    """The seconds of a step: sampling, passes without gradient, training passes."""
    return (sampling_seconds(c, load, card) + training_seconds(c, load, card)
            + reading_seconds(c, load, card))


def gathered_seconds(c, load, card):
    """What a pass waits for the blocks' weights of other ranks (--shard)."""
    blocks = c.num_hidden_layers * block_numbers(c) * load.itemsize
    return (1 - 1 / load.shards) * blocks / card.link


def dense_seconds(c, load, card):
    """What a pass takes to make NF4 weights dense."""
    return load.nf4 * c.num_hidden_layers * block_numbers(c) * NF4_MOVED / card.moved


def sampling_seconds(c, load, card):
    """Each token of a round reads all weights and the cache; rounds follow one another."""
    if not load.places:
        return 0
    blocks = c.num_hidden_layers * block_numbers(c)
    head = load.vocab * c.hidden_size
    width = 2 * load.itemsize * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    cache = width * (load.places * load.prompt + load.rows * load.new_tokens / 2)
    weights = (0 if load.nf4 else blocks * load.itemsize) + head * load.itemsize
    step = max((weights + cache) / card.moved, 2 * (blocks + head) * load.rows / card.products,
               c.num_hidden_layers * KERNELS * KERNEL_SECONDS)
    step += dense_seconds(c, load, card) + gathered_seconds(c, load, card)
    rounds = load.prompts / load.places
    prompts = 2 * blocks * load.prompts * load.prompt / card.products
    return rounds * load.new_tokens * step + prompts


def training_seconds(c, load, card):
    """Forward and backward to the activations alone, since weights are frozen; once more forward
    with --checkpointing."""
    if not load.pass_tokens:
        return 0
    blocks = c.num_hidden_layers * block_numbers(c)
    each = 3 if load.checkpointing else 2    # passes through the blocks
    head = 2 * load.vocab * c.hidden_size    # logits, and the gradient of the states
    products = 2 * load.train_tokens * (each * blocks + head) / card.products
    passes = each * -(-load.train_tokens // load.pass_tokens)
    return products + passes * (dense_seconds(c, load, card) + gathered_seconds(c, load, card))


def reading_seconds(c, load, card):
    """Embedding the completions by the base."""
    tokens = load.prompts * load.k * load.new_tokens if load.embedded else 0
    blocks = c.num_hidden_layers * block_numbers(c)
    passes = -(-tokens // max(load.embedded, 1))
    return (2 * blocks * tokens / card.products
            + passes * (dense_seconds(c, load, card) + gathered_seconds(c, load, card)))
