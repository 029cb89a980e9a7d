"""The room of pictures: where they come from, how samples and reconstructions of them are measured."""
