"""A program with the flags of the command."""

from demucs.api import Separator, save_audio
from demucs.separate import get_parser

words = ["-n", "time", "--repo", str(REPO), "--shifts", "0", "-d", "cpu", "--float32"]
args = get_parser().parse_args([*words, "--two-stems", "bass", "-o", str(OUT), str(TRACK)])
separator = Separator(
    model=args.name,
    repo=args.repo,
    device=args.device,
    shifts=args.shifts,
    overlap=args.overlap,
    split=args.split,
    segment=args.segment,
    jobs=args.jobs,
)
ext = "mp3" if args.mp3 else "flac" if args.flac else "wav"
files = []
for track in args.tracks:
    _, stems = separator.separate_audio_file(track)
    name = args.filename.format(track=track.stem, stem=args.stem, ext=ext, trackext="wav")
    files.append(args.out / name)
    files[-1].parent.mkdir()
    save_audio(
        stems[args.stem],
        files[-1],
        separator.samplerate,
        bitrate=args.mp3_bitrate,
        preset=args.mp3_preset,
        clip=args.clip_mode,
        as_float=args.float32,
        bits_per_sample=24 if args.int24 else 16,
    )
facts = args.other_method, args.verbose, args.mp3_bitrate, args.mp3_preset, args.clip_mode
