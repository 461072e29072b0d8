"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user can fix: the text names file or key, rule and remedy. Shown without a traceback."""
