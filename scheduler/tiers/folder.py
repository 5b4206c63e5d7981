"""What the folder of `--cache-dir` has for the ranks that are there: read once for each group of ranks."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from vibe_sgl_lite.runtime.errors import VibeError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import RankReady
from vibe_sgl_lite.runtime.page_folder import KEY_BYTES, file_bytes, list_pages
from vibe_sgl_lite.runtime.settings.weights_digest import dummy_digest, weights_digest
from vibe_sgl_lite.scheduler.tiers.disk import TierContents

GB = 10**9
WAIT_S = 0.2  # between heartbeats, for the weights' digest
# Of a model's config, what no value in the KV cache depends on.
NOT_IN_KV = {"eos_token_ids", "bos_token_id", "generation_defaults"}

log = logging.getLogger(__name__)


class CacheFolder:
    """The folder that the settings name. The digest of the weights is worked out while the ranks load them."""

    def __init__(self, spec: PipelineSpec, heartbeat: Callable[[], None]) -> None:
        """spec: with the weights in force; others are refused where there is a folder."""
        assert spec.args.cache_dir is not None
        self._spec = spec
        self._heartbeat = heartbeat
        self._path = Path(spec.args.cache_dir)
        self._digest: str | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._work_out_digest, name="weights-digest", daemon=True)
        self._thread.start()

    def contents(self, ready: RankReady) -> TierContents | None:
        """For these ranks, before their first step. None, with one line in the log: the folder cannot be used."""
        while self._thread.is_alive():
            self._thread.join(WAIT_S)
            self._heartbeat()
        ranks = self._spec.args.tp
        limit = int(self._spec.args.cache_dir_size * GB)
        page_bytes = ranks * file_bytes(ready.page_bytes)
        try:
            pages = list_pages(self._path, self._heartbeat)
        except OSError as error:
            self._problem = error.strerror or str(error)
        if self._digest is None or self._problem:
            log.warning("--cache-dir %s is not used: %s", self._path, self._problem)
            return None
        if page_bytes > limit:
            log.warning(
                "--cache-dir-size %g holds no page of %d bytes: nothing is stored",
                self._spec.args.cache_dir_size, page_bytes,
            )  # fmt: skip
        used = sum(page.size for page in pages)
        log.info("%d KV pages, %.2f of %g GB, are in %s", len(pages), used / GB, limit / GB, self._path)
        root = cache_root(self._spec, ready.kv_format, self._digest)
        return TierContents(
            root, ranks, page_bytes, ready.page_bytes, limit, [(page.key, page.size, page.ranks) for page in pages]
        )

    def cannot_store(self, why: str) -> None:
        """Tells it once."""
        if not self._problem:
            self._problem = why
            log.warning("--cache-dir %s gets no more pages: %s", self._path, why)

    def _work_out_digest(self) -> None:
        folder = self._spec.weights.folder
        if not folder:
            self._digest = dummy_digest(self._spec.args.seed)
            return
        try:
            self._digest = weights_digest(Path(folder), self._path / "digests")
        except (VibeError, OSError) as error:
            self._problem = str(error)


def cache_root(spec: PipelineSpec, kv_format: str, digest: str) -> bytes:
    """Stands for all that the values of a page depend on but its tokens and their salt. digest: of the weights."""
    model = {key: value for key, value in msgspec.to_builtins(spec.model).items() if key not in NOT_IN_KV}
    args = spec.args
    facts = [
        digest, model, kv_format, spec.dtype, args.quantization, args.kv_cache_dtype, args.deterministic,
        spec.page_size, args.tp, args.ep,
    ]  # fmt: skip
    return hashlib.blake2b(msgspec.json.encode(facts, order="sorted"), digest_size=KEY_BYTES).digest()
