"""What a bundle holds beside its graphs: instances, the manifest's words, the device's side, a page, a server."""
