"""Options of an answer as they come from outside: their types are checked here, their ranges by the system.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llava.errors import OptionError
from llava.serve.limits import Limits, RequestError

if TYPE_CHECKING:
    from llava.detector import AnalyzeOptions, ForgeryDetector

_NOT_OUTSIDE = ("attention",)
"""Options that a request says elsewhere."""
_MOST = {"samples": 8, "num_beams": 8}
_LONGEST_TEXT = 8000


class OptionReader:
    """Reads the options of one detector's system.

    Args:
        detector: The detector.
        limits: Of the server.

    Attributes:
        model: What a request may say, as a pydantic model.
    """

    def __init__(self, detector: "ForgeryDetector", limits: Limits) -> None:
        self._detector = detector
        self._limits = limits
        own = detector.system.options
        hints = get_type_hints(own)
        entries: dict[str, Any] = {
            field.name: (hints[field.name], None if field.default is MISSING else field.default)
            for field in fields(own)
            if field.init and field.name not in _NOT_OUTSIDE
        }
        self.model: type[BaseModel] = create_model(
            "Options", __config__=ConfigDict(extra="forbid", strict=True), **entries
        )

    def read(self, given: Mapping[str, Any], *, attention: bool) -> "AnalyzeOptions":
        """Returns the options.

        Raises:
            RequestError: 422, there is no such option, or its value is of another type or out of range.
        """
        try:
            values = self.model(**given).model_dump()
            values["max_new_tokens"] = self._tokens(given, values)
            self._check(values)
            return self._detector.options(**values, attention=attention)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise RequestError(422, "bad_option", f"option {where}: {fault['msg']}") from None
        except OptionError as error:
            raise RequestError(422, "bad_option", str(error)) from None

    def _tokens(self, given: Mapping[str, Any], values: Mapping[str, Any]) -> int:
        """The answer's length: as asked for, or as the system has it where the server allows that."""
        asked = int(values["max_new_tokens"])
        return asked if "max_new_tokens" in given else min(asked, self._limits.answer_tokens)

    def _check(self, values: Mapping[str, Any]) -> None:
        for name, most in {**_MOST, "max_new_tokens": self._limits.answer_tokens}.items():
            if values[name] > most:
                raise OptionError(f"{name} must be at most {most} here, not {values[name]}")
        for name, value in values.items():
            if isinstance(value, str) and len(value) > _LONGEST_TEXT:
                raise OptionError(f"{name} must have at most {_LONGEST_TEXT} characters, not {len(value)}")
