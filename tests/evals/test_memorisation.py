from evals.metrics.neighbours import copying_verdict


def test_verdict_follows_the_smaller_ratio_and_the_share() -> None:
    assert copying_verdict({"fd_lite0": 1.0}) is None
    assert (copying_verdict({"nn_ratio": 1.6, "nn_ratio_latents": 0.5}) or "").startswith("copies: ")
    at_times = copying_verdict({"nn_ratio": 1.0, "nn_ratio_latents": 1.0, "copied_share_latents": 0.3})
    assert "30%" in (at_times or "")
    assert (copying_verdict({"nn_ratio": 1.0, "copied_share_latents": 0.05}) or "").startswith("does not copy more")
