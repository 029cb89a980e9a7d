"""The flags of commands that can push to the Hugging Face hub; read without torch."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class HubFlags:
    """The model folder on the Hugging Face hub."""

    push_to_hub: bool = False
    """Upload the model folder with its card at the end; `hf auth login` or HF_TOKEN says who you are."""
    hub_model_id: str | None = None
    """The repository on the hub, name or user/name; default: the name of the run folder."""
