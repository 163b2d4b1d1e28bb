"""A wrapper that relies on the exit codes of the command."""

from demucs.separate import main


def run(*words):
    try:
        return main([*words, "-o", str(OUT)])
    except SystemExit as error:
        return error.code


facts = [
    run(),
    run("--nonsense"),
    run("-n", "nosuch", "--repo", str(REPO), str(TRACK)),
    run("-n", "time", "--repo", str(REPO), "-d", "cpu", str(TRACK.with_name("absent.wav"))),
    run("-n", "time", "--repo", str(REPO), "-d", "cpu", "--two-stems", "piano", str(TRACK)),
    run("-n", "htdemucs", "--repo", str(REPO), "-d", "cpu", "--segment", "50", str(TRACK)),
    run("--list-models", "--repo", str(REPO)),
]
