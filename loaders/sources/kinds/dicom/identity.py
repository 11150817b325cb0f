"""Keys and groups that tell images, studies and patients apart, and nobody who they are: HMAC-SHA-256 (RFC 2104)."""

import hmac
import secrets
from pathlib import Path

from loaders.errors import UserError, check_regular, told

_BYTES = 32  # of a key that is made here: as many as SHA-256 has
_LEAST, _MOST = 16, 4096
_GROUP_BITS = 53  # whole numbers up to here survive JSON, CSV and float64
_HOW = "make one with: head -c 32 /dev/urandom > FILE, and let nobody read it who may not know the patients"


def read_secret(path: Path | None) -> bytes:
    """The key of the hash: a file's bytes, or random ones without a file. UserError for a file that is none, or that
    could be guessed: less than 16 bytes."""
    if path is None:
        return secrets.token_bytes(_BYTES)
    if not path.is_file():
        check_regular(path)
        raise UserError(f"there is no file {path} for --set secret; {_HOW}")
    with told(f"{path} cannot be read"), open(path, "rb") as file:
        data = file.read(_MOST + 1)
    if not _LEAST <= len(data) <= _MOST:
        size = f"{len(data)}" if len(data) <= _MOST else f"more than {_MOST:,}"
        raise UserError(f"{path} holds {size} bytes; a secret has {_LEAST} to {_MOST:,}: {_HOW}")
    return data


class Pseudonyms:
    """What stands in a pack for a patient, a study and an image: the same for the same secret, whatever the pack."""

    def __init__(self, secret: bytes):
        self._secret = secret

    def group(self, patient: str, study: str) -> int:
        """A number below 2^53 for the patient; for the study, where no patient is named; -1 where neither is."""
        if not (patient or study):
            return -1
        digest = self._digest("patient", patient) if patient else self._digest("study", study)
        return int.from_bytes(digest[:8], "big") >> (64 - _GROUP_BITS)

    def key(self, patient: str, study: str, image: str) -> str:
        """PATIENT/STUDY/IMAGE, 16 hexadecimal digits each; `unknown` for what the file does not tell."""
        parts = {"patient": patient, "study": study, "image": image}
        return "/".join(self._digest(what, name)[:8].hex() if name else "unknown" for what, name in parts.items())

    def _digest(self, what: str, name: str) -> bytes:
        return hmac.digest(self._secret, f"{what}\0{name}".encode(errors="surrogateescape"), "sha256")
