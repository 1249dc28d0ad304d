import json
import os
from pathlib import Path

from google.colab import errors


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):
    def __init__(self, key):
        super().__init__(f"Requesting secret {key} timed out.")


def get(key):
    path = Path(os.environ["COLAB_ACCOUNT"]) / "secrets.json"
    if not path.exists():
        raise TimeoutException(key)
    secrets = json.loads(path.read_text())
    if key not in secrets:
        raise SecretNotFoundError(key)
    if not secrets[key]["access"]:
        raise NotebookAccessError(key)
    return secrets[key]["payload"]
