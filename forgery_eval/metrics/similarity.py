"""CSS: cosine of the CLIP text embeddings of two texts."""

from collections.abc import Sequence

import numpy as np

_BATCH = 64


class TextSimilarity:
    """CLIP's text tower, loaded once.

    Args:
        path: Folder or hub id of a CLIP model.
        device: Where it runs; by default a GPU if there is one.

    Raises:
        OSError: There is no such model.
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        import torch
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        class TextTower(CLIPTextModelWithProjection):
            """The text half of a CLIP model; the other half is left in its file without a word."""

            _keys_to_ignore_on_load_unexpected = (r"vision_model\.", r"visual_projection\.", "logit_scale")

        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._tower = TextTower.from_pretrained(path).to(self._device).eval()
        self._longest = self._tower.config.max_position_embeddings

    def cut(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Compares texts of which only the beginning is read, 77 tokens in published CLIP models."""
        return self._compare(texts, references, chunked=False)

    def chunked(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """Compares whole texts: the mean of the embeddings of their parts, weighted by the parts' lengths."""
        return self._compare(texts, references, chunked=True)

    def token_ids(self, text: str) -> list[int]:
        """Returns the ids that ``cut`` reads."""
        return self._parts(text, chunked=False)[0]

    def _compare(self, texts: Sequence[str], references: Sequence[str], *, chunked: bool) -> list[float]:
        different = list(dict.fromkeys([*texts, *references]))
        embeddings = self._embed(different, chunked=chunked)
        row = {text: number for number, text in enumerate(different)}
        pairs = zip(texts, references, strict=True)
        return [float(embeddings[row[text]] @ embeddings[row[reference]]) for text, reference in pairs]

    def _embed(self, texts: Sequence[str], *, chunked: bool) -> np.ndarray:
        """Embeddings of length 1, one row a text."""
        parts = [(owner, ids) for owner, text in enumerate(texts) for ids in self._parts(text, chunked=chunked)]
        parts.sort(key=lambda part: len(part[1]))
        sums = np.zeros((len(texts), self._tower.config.projection_dim))
        for start in range(0, len(parts), _BATCH):
            batch = parts[start : start + _BATCH]
            for (owner, ids), embedding in zip(batch, self._embed_ids([ids for _, ids in batch]), strict=True):
                sums[owner] += embedding * len(ids)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def _parts(self, text: str, *, chunked: bool) -> list[list[int]]:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        length = self._longest - 2  # the two end tokens
        starts = range(0, max(1, len(ids)), length) if chunked else (0,)
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return [[begin, *ids[start : start + length], end] for start in starts]

    def _embed_ids(self, rows: Sequence[list[int]]) -> np.ndarray:
        import torch

        longest = max(map(len, rows))
        end = self._tokenizer.eos_token_id
        # The tower reads a text at its first end token and is causal, so that what fills a row up has no effect.
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=self._device)
        with torch.no_grad():
            embeddings = self._tower(input_ids=ids).text_embeds
        normal: np.ndarray = torch.nn.functional.normalize(embeddings, dim=-1).double().cpu().numpy()
        return normal
