"""One exception type for everything a user can put right.

Stages raise `UserError` with *what* happened, *where*, and *what to do*; the command line prints that as a single
line and exits with status 2. Any other exception is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in the input, the settings or the machine. The message is one line a person can act on."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what + (f" in {where}" if where else "") + (f". {fix}" if fix else "")
        super().__init__(" ".join(message.split()))
