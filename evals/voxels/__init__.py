"""The room of shapes: files of them, how samples and reconstructions of them are measured."""
