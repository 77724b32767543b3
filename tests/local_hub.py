"""
Replaces the Hugging Face hub by the folder ``HUB`` when this module is imported.
"""

import os
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_sb3
from requests.exceptions import HTTPError

HUB = Path(os.environ["HUB"])


class LocalHub:
    """The calls of ``HfApi`` that rl-zoo3 makes."""

    def create_repo(self, repo_id, **kwargs):
        (HUB / repo_id).mkdir(parents=True, exist_ok=True)
        return str(HUB / repo_id)

    def snapshot_download(self, repo_id, local_dir):
        shutil.copytree(HUB / repo_id, local_dir, dirs_exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, HUB / repo_id, dirs_exist_ok=True)


def load_from_hub(repo_id, filename):
    path = HUB / repo_id / filename
    if not path.is_file():
        raise HTTPError(f"There is no {path}")
    return str(path)


huggingface_hub.HfApi = LocalHub
huggingface_sb3.load_from_hub = load_from_hub
