"""Prompts refined by a language model: a few words become the kind of sentence that video models were trained on.

Any server that speaks OpenAI's chat completions will do, and the caller names it; there is no default address. Nothing
but the prompt and the instructions below is sent, and nothing is sent on: redirects are refused, because they would
carry the key to somebody else.
"""

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opensora.contents import parse_json, read_text
from opensora.errors import OpenSoraError
from opensora.models.text.prompts import join_loops, split_loops

INSTRUCTIONS = """\
You write captions for a text-to-video model. The user sends a short idea of a clip; answer with one vivid sentence of \
at most 80 words that a camera could have recorded.
Say who or what is in view, how it looks and how it moves, where it is, how the light falls, and how the camera stands \
or moves. Keep everything the idea says, in the language it is written in; add only what fits it. A caption describes \
what is seen: no feelings, no sound, no story before or after, no scores or numbers of frames.
Answer with the sentence alone: no quotation marks, no introduction, no list."""

_LONGEST_ANSWER_BYTES = 1_000_000


@dataclass(frozen=True)
class Refiner:
    """A language model behind a chat completions endpoint.

    Args:
        endpoint: address that `/chat/completions` is appended to, such as `http://localhost:8000/v1`.
        model: name of the language model, as the endpoint knows it.
        key: sent as a bearer token; None for none. It appears in no error and no `repr`.
        timeout_s: how long to wait for an answer.

    Raises:
        OpenSoraError: not an http or https address, or a key that cannot be sent.
    """

    endpoint: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        address = _split_address(self.endpoint)
        if address is None or address.username or address.password:
            raise OpenSoraError(
                "the endpoint is to be an address such as http://localhost:8000/v1, without name and password"
            )
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise OpenSoraError("the key is empty or holds spaces, line breaks or letters that no key has")

    def refine(self, prompt: str) -> str:
        """The refined prompt; of one with a text for each loop (`|0|...`), every text is refined by itself.

        Raises:
            OpenSoraError: the endpoint cannot be reached, refuses, or does not answer as expected.
        """
        texts, starts = split_loops(prompt)
        return join_loops([self._refine_text(text) for text in texts], starts)

    def _refine_text(self, text: str) -> str:
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": text}]
        answer = self._post({"model": self.model, "messages": messages})
        try:
            refined = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise OpenSoraError(f"{self._name} answered with JSON that holds no completion") from None
        refined = _one_sentence(refined) if isinstance(refined, str) else ""
        if not refined:
            raise OpenSoraError(f"{self._name} answered with an empty text; try again, or another model")
        return refined

    @property
    def _name(self) -> str:
        """The server, without what a query may hold."""
        address = urlsplit(self.endpoint)
        return f"the endpoint {address.scheme}://{address.netloc}{address.path}"

    def _post(self, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = urlsplit(self.endpoint)
        url = address._replace(path=address.path.rstrip("/") + "/chat/completions").geturl()
        request = urllib.request.Request(url, json.dumps(content).encode(), headers)
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
                body = response.read(_LONGEST_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise OpenSoraError(f"{self._name} answered HTTP {error.code}{self._reason(error)}") from None
        except TimeoutError:
            raise OpenSoraError(f"{self._name} did not answer within {self.timeout_s:g} s") from None
        except (urllib.error.URLError, OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise OpenSoraError(f"{self._name} did not answer within {self.timeout_s:g} s") from None
            raise OpenSoraError(f"{self._name} cannot be reached: {self._without_key(str(reason))}") from None
        try:
            if len(body) > _LONGEST_ANSWER_BYTES:
                raise ValueError
            return parse_json(body, "the answer")
        except ValueError:
            raise OpenSoraError(f"{self._name} answered with something that is not JSON") from None

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the server says of it, where it says it as OpenAI's does."""
        if error.code in (401, 403):  # some quote the key there
            return ": it does not accept the key" if self.key else ": it wants a key"
        if 300 <= error.code < 400:
            return ", a redirect, which is not followed; give the address it leads to"
        try:
            said = parse_json(error.read(_LONGEST_ANSWER_BYTES), "the answer")["error"]["message"]
        except (ValueError, LookupError, TypeError, OSError, HTTPException):
            said = error.reason
        said = self._without_key(" ".join(str(said).split()))[:200]
        return f": {said}" if said else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "...") if self.key else text


def refiner_of(
    endpoint: str | None,
    model: str | None,
    key_file: Path | None,
    key_env: str | None,
    *,
    closed_vocabulary: str | None,
) -> Refiner:
    """A refiner as a user names it.

    Args:
        endpoint: address of the server.
        model: name of the language model there.
        key_file: file that holds the key,
        key_env: or the environment variable that does.
        closed_vocabulary: name of a video model that knows few words; None for any other.

    Raises:
        OpenSoraError: half of it, an unreadable key, or a video model that would not know the words.
    """
    if endpoint is None or model is None:
        raise OpenSoraError("refining the prompt needs both `refine_endpoint` URL and `refine_model` NAME")
    if closed_vocabulary is not None:
        raise OpenSoraError(f"{closed_vocabulary} knows a closed list of words, so its prompts cannot be refined")
    if key_file is not None and key_env is not None:
        raise OpenSoraError("`refine_key_file` and `refine_key_env` both say the key; give one of them")
    return Refiner(endpoint, model, read_key(key_file, key_env))


def read_key(file: Path | None, variable: str | None) -> str | None:
    """The key in a file or in an environment variable that the user names; None if neither is named.

    Raises:
        OpenSoraError: no such file or variable, or no text in it.
    """
    if variable is not None:
        if variable not in os.environ:
            raise OpenSoraError(f"the environment variable {variable} (`refine_key_env`) is not set")
        return os.environ[variable].strip()
    if file is None:
        return None
    return read_text(file.expanduser(), "key file").strip()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _split_address(endpoint: str) -> Any:
    """The parts of an http address; None for anything else."""
    try:
        address = urlsplit(endpoint)
        _ = address.port  # raises for a number that is none
    except ValueError:
        return None
    good = address.scheme in ("http", "https") and address.hostname and not re.search(r"[\s\x00-\x1f]", endpoint)
    return address if good else None


def _one_sentence(answer: str) -> str:
    """The answer on one line, without the thoughts before it, quotation marks, and what means something in a prompt."""
    spoken = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    text = " ".join(re.sub(r"[|{}]", " ", spoken).split())
    quoted = re.fullmatch(r"""["'“„«]([^"“”„«»]*)["'”“»]""", text)
    return quoted[1].strip() if quoted else text
