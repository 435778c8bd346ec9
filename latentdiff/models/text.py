"""The text tower of CLIP (Radford et al. 2021, arXiv 2103.00020, sec. 2.4) in all of its sizes, and its tokenizer.

The same functions as transformers' `CLIPTextModel` and `CLIPTokenizer`, to which tests hold them, with the parameter names that the
files have. They are written out because importing transformers' takes twice as long as importing torch, and brings torchvision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A CLIP text tower and what is taken from it; the default is CLIP ViT-L/14's, as SD 1.x uses it.

    `layer` indexes the tower's hidden states (-1: after the last block, -2: before it, SDXL's "hidden 11" of CLIP-L);
    `final_norm` says whether the final LayerNorm is applied to what was taken. With `pooled` the tower also gives the
    state of its end token after the last block, final norm and text projection.
    """

    width: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    vocab: int = 49408
    length: int = 77  # tokens, begin and end included
    projection: int | None = None  # width of the text projection, None without one
    norm_eps: float = 1e-5
    layer: int = -1
    final_norm: bool = True
    pooled: bool = False
    begin: int = 49406
    end: int = 49407
    pad: int = 49407  # the id after the end token; 0 in OpenCLIP's towers, where a typed "!" still is token 256

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.pooled and self.projection is None:
            raise ValueError("pooled=True needs a projection, got projection=None")
        if not -self.layers - 1 <= self.layer <= -1:
            raise ValueError(f"layer must be from {-self.layers - 1} to -1, got {self.layer!r}")


WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Tokenizer:
    """CLIP's byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) of lower-cased text.

    Begin, end and padding are not put in, and nothing that is typed becomes one of them: they belong to the tower (`TowerSpec`).
    `added` words, beyond the vocabulary, are found in the text as they stand and get the next ids. Where `word_1`, `word_2`, … are
    added too, `word` means all of them (a textual inversion of several vectors).
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        begin: str = "<|startoftext|>",
        end: str = "<|endoftext|>",
        length: int = 77,
        added: Sequence[str] = (),
    ):
        for name, token in (("begin", begin), ("end", end)):
            if token not in vocab:
                raise ValueError(f"{name} must be in the vocabulary, got {token!r}")
        self.vocab, self.merges, self.added = dict(vocab), list(merges), list(added)
        self.begin, self.end, self.length = begin, end, length
        self.backend = Backend(models.BPE(self.vocab, self.merges, end_of_word_suffix="</w>", unk_token=end))
        self.backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self.backend.add_tokens([AddedToken(word) for word in self.added])
        self.several = {self.id(word): ids for word in self.added if len(ids := self._vectors(word)) > 1}

    def _vectors(self, word: str) -> list[int]:
        ids = [self.id(word)]
        while (following := self.id(f"{word}_{len(ids)}")) is not None and f"{word}_{len(ids)}" in self.added:
            ids.append(following)
        return [id for id in ids if id is not None]

    def __call__(self, text: str) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [one for id in ids for one in self.several.get(id, [id])] if self.several else ids

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def begin_id(self) -> int:
        return self.vocab[self.begin]

    @property
    def end_id(self) -> int:
        return self.vocab[self.end]

    def id(self, token: str) -> int | None:
        """The id of a token or an added word."""
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str | None:
        return self.backend.id_to_token(id)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x): the approximation that OpenAI trained with (Hendrycks & Gimpel 2016, arXiv 1606.08415, sec. 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocab, spec.width)
        self.position_embedding = nn.Embedding(spec.length, spec.width)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CausalAttention(nn.Module):
    """Each token looks at itself and those before it."""

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.heads = spec.heads
        self.k_proj = nn.Linear(spec.width, spec.width)
        self.v_proj = nn.Linear(spec.width, spec.width)
        self.q_proj = nn.Linear(spec.width, spec.width)
        self.out_proj = nn.Linear(spec.width, spec.width)

    def split(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n e"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [b, heads, n, e]
        return self.out_proj(x.transpose(1, 2).flatten(2))  #          [b, n, d]


class MLP(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.fc1 = nn.Linear(spec.width, spec.mlp)
        self.fc2 = nn.Linear(spec.mlp, spec.width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.self_attn = CausalAttention(spec)
        self.layer_norm1 = nn.LayerNorm(spec.width, spec.norm_eps)
        self.mlp = MLP(spec)
        self.layer_norm2 = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))


class TextModel(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.encoder = Encoder(spec)
        self.final_layer_norm = nn.LayerNorm(spec.width, spec.norm_eps)

    def forward(self, ids: Int[Tensor, "b n"]) -> list[Float[Tensor, "b n d"]]:
        """All hidden states: the embeddings, and what each block gives."""
        states = [self.embeddings(ids)]
        for block in self.encoder.layers:
            states.append(block(states[-1]))
        return states


class TextTower(nn.Module):
    """Token ids to what the U-Net listens to."""

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.spec = spec
        self.text_model = TextModel(spec)
        if spec.projection is not None:
            self.text_projection = nn.Linear(spec.width, spec.projection, bias=False)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"] | None]:
        """The hidden states that the spec names and, with `pooled`, the projected state of the first end token."""
        states, norm = self.text_model(ids), self.text_model.final_layer_norm
        hidden = states[self.spec.layer]
        hidden = norm(hidden) if self.spec.final_norm else hidden
        return hidden, self.pool(norm(states[-1]), ids) if self.spec.pooled else None

    def pool(self, last: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """The text projection of the state at each text's first end token: what CLIP compares with pictures."""
        end = (ids == self.spec.end).int().argmax(dim=1)
        return self.text_projection(last[torch.arange(len(ids), device=ids.device), end])
