"""Networks alone: fields, the bases they are mixed from, encoders; no file formats but their own, no flags."""
