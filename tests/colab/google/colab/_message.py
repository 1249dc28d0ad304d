class MessageError(Exception):
    """What the browser says instead of an answer."""
