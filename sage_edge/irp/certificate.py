"""The certificate: what calibration found, as certificate.yaml in the engine's folder, bound to that engine and its data.

It names the engine by the digest of manifest.yaml, which in turn holds the digest of every other file; so it lies beside
the manifest, not inside it: the manifest stays what the build wrote, and a new build sweeps the certificate away. Its last
line is the SHA-256 of every byte before it. That is a guard against damage, mix-ups and edits by hand. It is no signature:
whoever can write the folder can write another certificate.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sage_edge.config import dump_yaml, parse_yaml, read_text
from sage_edge.errors import InputError, IntegrityError
from sage_edge.files import sha256, write_atomic
from sage_edge.irp.calibrate import Acceptance, Calibration, Certified, Promise
from sage_edge.irp.halting import AllOf, Policy, parse_policy

FORMAT = "sage-edge-certificate/1"
CERTIFICATE_FILE = "certificate.yaml"
UNLIMITED = 1 << 30  # parse_policy always adds a limit of steps; this one is never reached
CERTIFIED = "certified"  # the word that stands for the certificate's policy wherever a policy is asked for
_SEAL = re.compile(rb"sha256: ([0-9a-f]{64})\n")
REMEDY = "delete it, or run `sage-edge calibrate` again"


@dataclass(frozen=True)
class Certificate:
    """The content of certificate.yaml.

    policy, threshold, items, loss_sum, bound and mean_steps are those of `Certified`; items_total counts the calibration
    items, of which some only chose between families or calibrated `acceptance`. families: what each family reached
    alone, each at the same confidence for itself. Raises ValueError, naming the field, for what no calibration gives.
    """

    format: Literal["sage-edge-certificate/1"]
    engine: str
    engine_sha256: str
    data_sha256: str
    loss: str
    max_loss: float
    confidence: float
    searched: tuple[str, ...]
    items_total: int
    max_steps: int
    chosen: Certified
    families: tuple[Certified, ...]
    acceptance: Acceptance | None

    def __post_init__(self) -> None:
        for name in ("engine_sha256", "data_sha256"):
            if not re.fullmatch(r"[0-9a-f]{64}", getattr(self, name)):
                raise ValueError(f"{name}: expected a SHA-256 of 64 hexadecimal digits")
        if self.max_steps < 1 or not 0 < self.chosen.items <= self.items_total:
            raise ValueError("max_steps, items_total: do not fit the rest")
        if not (0 < self.max_loss < 1 and 0 < self.confidence < 1 and 0 <= self.chosen.bound <= self.max_loss + 1e-9):
            raise ValueError("bound: must lie in 0..max_loss, and max_loss and confidence in 0..1")
        try:
            parse_policy(self.chosen.policy, self.max_steps)
            if self.acceptance:
                parse_policy(self.acceptance.policy, self.max_steps)
        except InputError as error:
            raise ValueError(f"policy: {error}") from error

    @property
    def policy(self) -> str:
        return self.chosen.policy

    def expand(self, halt: str) -> str:
        """`halt` with the word `certified` replaced by this certificate's policy."""
        limit = f"max_steps:{self.max_steps}"  # calibrated under this limit, so it holds under this one only
        own = limit if self.policy == "full" else f"{self.policy} or {limit}"
        return re.sub(rf"(?<![\w:]){CERTIFIED}(?![\w:])", f"({own})", halt)

    def accepts(self) -> Policy | None:
        """The policy that fires where an answer may be called settled; None when acceptance was not calibrated.

        Only answers that halted as certified are covered: one cut short by a deadline or a smaller limit is not.
        """
        if self.acceptance is None:
            return None
        sure = parse_policy(self.acceptance.policy, UNLIMITED)
        return AllOf((sure, parse_policy(self.policy, self.max_steps)))


def uses_certificate(halt: object) -> bool:
    """Whether a policy's text refers to the certificate."""
    return isinstance(halt, str) and re.search(rf"(?<![\w:]){CERTIFIED}(?![\w:])", halt) is not None


def certify(calibration: Calibration, promise: Promise, searched: tuple[str, ...], *, engine: Path, data_sha256: str,
            items: int, max_steps: int) -> Certificate:  # fmt: skip
    """Bind a calibration to an engine folder and to the data it was made with."""
    return Certificate(
        format="sage-edge-certificate/1",
        engine=engine.name,
        engine_sha256=sha256(engine / "manifest.yaml"),
        data_sha256=data_sha256,
        loss=promise.loss.name,
        max_loss=promise.max_loss,
        confidence=promise.confidence,
        searched=searched,
        items_total=items,
        max_steps=max_steps,
        chosen=calibration.chosen,
        families=calibration.families,
        acceptance=calibration.acceptance,
    )


def save_certificate(folder: Path, certificate: Certificate) -> Path:
    """Write certificate.yaml into an engine folder, whole or not at all; an older one is replaced."""
    text = dump_yaml(certificate)
    path = folder / CERTIFICATE_FILE
    write_atomic(path, f"{text}sha256: {hashlib.sha256(text.encode()).hexdigest()}\n")
    return path


def load_certificate(folder: Path) -> Certificate | None:
    """The certificate of an engine folder, or None when it has none.

    Raises IntegrityError when it was altered or belongs to another engine; InputError when it cannot be read.
    """
    path = folder / CERTIFICATE_FILE
    if not path.exists():
        return None
    read_text(path)  # for its complaints; it would also read \r as \n, so the seal is checked on the bytes
    certificate = unseal(path.read_bytes(), str(path))
    if certificate.engine_sha256 != sha256(folder / "manifest.yaml"):
        raise IntegrityError(
            f"{path}: is of another engine ({certificate.engine}); a threshold is void for any engine but its own: {REMEDY}"
        )
    return certificate


def unseal(content: bytes, name: str) -> Certificate:
    """The certificate in the bytes of a file called `name`. Raises IntegrityError when any of them was altered."""
    start = content.rfind(b"\n", 0, -1) + 1
    found = _SEAL.fullmatch(content[start:])
    if found is None or found[1].decode() != hashlib.sha256(content[:start]).hexdigest():
        raise IntegrityError(f"{name}: changed since it was written (SHA-256 differs); not used: {REMEDY}")
    return parse_yaml(content[:start].decode("utf-8"), Certificate, name)


def require_data(certificate: Certificate, data_sha256: str, source: str) -> None:
    """Raise IntegrityError unless the certificate was made with the data of this digest."""
    if certificate.data_sha256 != data_sha256:
        raise IntegrityError(
            f"{source}: is not the data that the certificate was made with (SHA-256 {data_sha256[:12]}… of its first "
            f"{certificate.items_total} examples, the certificate says {certificate.data_sha256[:12]}…)"
        )
