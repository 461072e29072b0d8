"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user can fix: the text names the file or key, the rule, and the remedy. Shown without a traceback."""
