"""A BERT sentence encoder, for --embedder."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from generate import Embedder
from support.embedders import SentenceFormat, sentence_format
from support.files import InputError, fetch, read_json, short
from support.hub import model_shapes, read_tensors, same_layout, tensor_shapes
from support.model_config import LARGEST
from support.registry import EMBEDDERS


# ---- The network: names are Hugging Face's -------------------------------------------------------

def layer_norm(config):
    return nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])


def embedding_tables(config):
    """Words, learnt positions, the number of the text, and the norm of their sum."""
    width = config["hidden_size"]
    return nn.ModuleDict({
        "word_embeddings": nn.Embedding(config["vocab_size"], width),
        "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
        "token_type_embeddings": nn.Embedding(config["type_vocab_size"], width),
        "LayerNorm": layer_norm(config)})


def output_layer(size, config):
    """The end of a half of a block, see add_and_norm; size: the width of its input."""
    return nn.ModuleDict({"dense": nn.Linear(size, config["hidden_size"]),
                          "LayerNorm": layer_norm(config)})


def encoder_layer(config):
    width = config["hidden_size"]
    inner = config["intermediate_size"]
    projections = nn.ModuleDict({"query": nn.Linear(width, width),
                                 "key": nn.Linear(width, width),
                                 "value": nn.Linear(width, width)})
    attention = nn.ModuleDict({"self": projections, "output": output_layer(width, config)})
    return nn.ModuleDict({"attention": attention,
                          "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
                          "output": output_layer(inner, config)})


def add_and_norm(output, x, y):
    """x + W y, normalised: unlike in Qwen3 each norm stands behind its sum."""
    return output["LayerNorm"](x + output["dense"](y))


class Bert(nn.Module):
    """A BERT encoder (arXiv 1810.04805), read as sentence-transformers' commonest kind is, such as
    all-MiniLM-L6-v2: the mean of the last hidden states over a text's tokens, [CLS] and [SEP]
    included. The pooler of its files is not used. Every token sees every other."""
    lockstep = original = None               # never spread over ranks, never trained

    def __init__(self, config):
        super().__init__()
        self.embeddings = embedding_tables(config)
        layers = nn.ModuleList(encoder_layer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.heads = config["num_attention_heads"]
        self.longest = config["max_position_embeddings"]
        self.form = SentenceFormat()         # what the folder's other files say

    device = property(lambda self: self.embeddings["LayerNorm"].weight.device)

    def forward(self, tokens, lengths):
        """Vectors (B, hidden) in fp32, not normed, of tokens (B, T) padded on the right."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        real = positions < lengths[:, None]                                    # (B, T)
        tables = self.embeddings
        x = tables["word_embeddings"](tokens) + tables["position_embeddings"](positions)
        x = tables["LayerNorm"](x + tables["token_type_embeddings"].weight[0])  # one text: type 0
        for layer in self.encoder["layer"]:
            attended = self.attend(layer["attention"]["self"], x, real)
            x = add_and_norm(layer["attention"]["output"], x, attended)
            inner = F.gelu(layer["intermediate"]["dense"](x))                  # exact, by erf
            x = add_and_norm(layer["output"], x, inner)
        return (x * real[..., None]).sum(1) / lengths[:, None]

    def attend(self, projections, x, real):
        """Attention (B, T, hidden) among the real tokens, (B, T) bool."""
        heads = (*x.shape[:2], self.heads, -1)
        q = projections["query"](x).view(heads).transpose(1, 2)                # (B, H, T, D)
        k = projections["key"](x).view(heads).transpose(1, 2)
        v = projections["value"](x).view(heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return out.transpose(1, 2).flatten(2)

    @classmethod
    def from_pretrained(cls, path, *, revision=None, device=None):
        """A frozen encoder in fp32 from a folder or a hub name, loaded strictly, and `form`, what
        the folder's other files say; InputError for another network, or for one that is pooled in
        another way than by the mean."""
        folder = fetch(path, revision)
        config = bert_config(folder)
        shapes = tensor_shapes(folder, own_name)
        if config["num_hidden_layers"] > len(shapes):
            raise InputError(f"the checkpoint in {folder} has {len(shapes)} tensors, too few for "
                             f"num_hidden_layers = {config['num_hidden_layers']}")
        with torch.device("meta"):
            model = cls(config)
        same_layout(folder, model_shapes(model), shapes)
        device = device or "cpu"
        tensors = read_tensors(folder, device, torch.float32, rename=own_name)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.form = sentence_format(folder, "mean", config["hidden_size"], device)
        if model.form.longest:
            model.longest = min(model.longest, model.form.longest)
        return model.requires_grad_(False).eval()


# ---- Its files -----------------------------------------------------------------------------------

UNUSED = re.compile(r"(bert\.)?(pooler\.|cls\.|embeddings\.position_ids)")

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "max_position_embeddings", "type_vocab_size")

# Settings with the only value that is implemented; a file may also leave them out.
IMPLEMENTED = {"hidden_act": "gelu", "model_type": "bert", "position_embedding_type": "absolute"}


def own_name(name):
    """The name that a file's tensor has here; "" for one that is not used."""
    return "" if UNUSED.match(name) else name.removeprefix("bert.")


def bert_config(folder):
    """config.json of a BERT encoder, checked before anything is built from it."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json does not hold a JSON object")
    wrong = first_wrong(config)
    if wrong is not None:
        raise InputError(f"{folder}/config.json has {wrong} = {short(config.get(wrong))}: only "
                         "BERT encoders with absolute positions and exact GELU are read")
    return config


def first_wrong(config):
    """The name of the first setting that is missing, impossible or not implemented, or None."""
    for name in SIZES:
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            return name
    for name, value in IMPLEMENTED.items():
        if config.get(name, value) != value:
            return name
    eps = config.get("layer_norm_eps")
    if not isinstance(eps, float) or not 0 < eps < 1:
        return "layer_norm_eps"
    if config["hidden_size"] % config["num_attention_heads"]:
        return "num_attention_heads"
    return None


class BertEmbedder(Embedder):
    """Texts -> unit vectors by a BERT encoder."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer, pooling="bert", form=model.form)

    @property
    def longest(self):
        return self.model.longest

    def token_ids(self, texts):
        """[CLS] .. [SEP]."""
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=True)]

    def pool(self, tokens, lengths):
        return self.model(tokens, lengths)


@EMBEDDERS.add("bert", "a BERT sentence encoder, the mean of its last states")
def load_bert(path, tokenizer, device):
    return BertEmbedder(Bert.from_pretrained(path, device=device), tokenizer)
