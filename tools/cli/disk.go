package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/extent"
	"github.com/landfall-dr/landfall/libs/hrl"
	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// copyChunk is the unit in which disk convert and disk compare read, in bytes.
const copyChunk = 1 << 20

func (a *app) hrlCommand() *cobra.Command {
	inspect := &cobra.Command{
		Use: "inspect FILE", Short: "Show header, blocks and entries of a replica log ([MS-HRL] version 2)", Args: cobra.ExactArgs(1),
		Example: "  landfall hrl inspect disk.hrl\n  landfall hrl inspect disk.hrl -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			format := hrl.FormatTable
			var buffered *bytes.Buffer
			out := a.out
			switch a.format {
			case "json":
				format = hrl.FormatJSON
			case "yaml":
				format, buffered = hrl.FormatJSON, &bytes.Buffer{}
				out = buffered
			}
			if err := hrl.InspectFile(cmd.Context(), args[0], out, format); err != nil {
				reason := typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
				if errors.Is(err, hrl.ErrCorrupt) || errors.Is(err, hrl.ErrTruncated) {
					reason = typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN
				}
				return errcat.Wrap(reason, err, "inspect %s", args[0])
			}
			if buffered != nil {
				var v any
				if err := json.Unmarshal(buffered.Bytes(), &v); err != nil {
					return err
				}
				return a.printValue(v)
			}
			return nil
		},
	}
	return group("hrl", "Replica logs", inspect)
}

func (a *app) diskCommand() *cobra.Command {
	var format string
	open := func(path string) (*vdisk.Image, error) {
		d, err := vdisk.Open(path, vdisk.Format(format), true)
		return d, diskError(err)
	}
	info := &cobra.Command{
		Use: "info IMAGE", Short: "Show an image's format, size and how much of it is data", Args: cobra.ExactArgs(1), Example: "  landfall disk info os.vhd",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := open(args[0])
			if err != nil {
				return err
			}
			defer d.Close()
			var data int64
			for r, err := range d.Extents(cmd.Context(), extent.Range{Len: d.Size()}) {
				if err != nil {
					return diskError(err)
				}
				data += r.Len
			}
			v := map[string]any{"path": args[0], "format": string(d.Format()), "size_bytes": d.Size(), "data_bytes": data}
			if f, ok := d.Footer(); ok {
				v["unique_id"] = f.UniqueID.String()
				v["geometry"] = map[string]any{"cylinders": f.Geometry.Cylinders, "heads": f.Geometry.Heads, "sectors": f.Geometry.Sectors}
			}
			if a.format != "table" {
				return a.printValue(v)
			}
			fmt.Fprintf(a.out, "%s: %s, %d bytes (%s), %s in data ranges\n", args[0], d.Format(), d.Size(), human(d.Size()), human(data))
			return nil
		},
	}
	mapping := &cobra.Command{
		Use: "map IMAGE", Short: "List the ranges of an image that may hold data", Args: cobra.ExactArgs(1), Example: "  landfall disk map os.vhd -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := open(args[0])
			if err != nil {
				return err
			}
			defer d.Close()
			if a.format == "table" {
				fmt.Fprint(a.out, "OFFSET\tLENGTH\n")
			}
			ranges := []map[string]int64{}
			for r, err := range d.Extents(cmd.Context(), extent.Range{Len: d.Size()}) {
				if err != nil {
					return diskError(err)
				}
				if a.format == "table" {
					fmt.Fprintf(a.out, "%d\t%d\n", r.Off, r.Len)
					continue
				}
				ranges = append(ranges, map[string]int64{"offset": r.Off, "length": r.Len})
			}
			if a.format == "table" {
				return nil
			}
			return a.printValue(ranges)
		},
	}
	var to string
	convert := &cobra.Command{
		Use: "convert IMAGE NEW", Short: "Copy an image into a new one, raw or fixed VHD; absent space stays absent", Args: cobra.ExactArgs(2),
		Example: "  landfall disk convert os.raw os.vhd --to vhd",
		RunE: func(cmd *cobra.Command, args []string) error {
			src, err := open(args[0])
			if err != nil {
				return err
			}
			defer src.Close()
			dst, err := vdisk.Create(args[1], vdisk.Format(to), src.Size())
			if err != nil {
				return diskError(err)
			}
			err = copyDisk(cmd.Context(), dst, src)
			if err = errors.Join(err, dst.Close()); err != nil {
				_ = os.Remove(args[1])
				return diskError(err)
			}
			return nil
		},
	}
	convert.Flags().StringVar(&to, "to", "vhd", "format of the new image: raw or vhd")
	compare := &cobra.Command{
		Use: "compare A B", Short: "Compare two images; the shorter one counts as padded with zeros", Args: cobra.ExactArgs(2), Example: "  landfall disk compare os.raw os.vhd",
		RunE: func(cmd *cobra.Command, args []string) error {
			x, err := open(args[0])
			if err != nil {
				return err
			}
			defer x.Close()
			y, err := open(args[1])
			if err != nil {
				return err
			}
			defer y.Close()
			at, err := compareDisks(cmd.Context(), x, y)
			if err != nil {
				return diskError(err)
			}
			if at >= 0 {
				fmt.Fprintf(a.err, "the images differ; the first difference is at byte %d\n", at)
				return errSilent
			}
			if a.format != "table" {
				return a.printValue(map[string]any{"identical": true})
			}
			fmt.Fprintln(a.out, "the images are identical")
			return nil
		},
	}
	g := group("disk", "Disk images: raw and fixed VHD", info, mapping, convert, compare)
	g.PersistentFlags().StringVar(&format, "format", "auto", "format of existing images: auto, raw or vhd")
	return g
}

func copyDisk(ctx context.Context, dst, src vdisk.Disk) error {
	buf := make([]byte, copyChunk)
	for r, err := range src.Extents(ctx, extent.Range{Len: src.Size()}) {
		if err != nil {
			return err
		}
		for off := r.Off; off < r.End(); {
			p := buf[:min(copyChunk, r.End()-off)]
			if _, err := src.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if !vdisk.IsZero(p) {
				if _, err := dst.WriteAt(p, off); err != nil {
					return err
				}
			}
			off += int64(len(p))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return dst.Sync()
}

// compareDisks returns where two disks differ first, or -1. Only ranges that hold data in one of them are read.
func compareDisks(ctx context.Context, x, y vdisk.Disk) (int64, error) {
	var ranges extent.Set
	for _, d := range []vdisk.Disk{x, y} {
		for r, err := range d.Extents(ctx, extent.Range{Len: d.Size()}) {
			if err != nil {
				return 0, err
			}
			ranges.Add(r)
		}
	}
	a, b := make([]byte, copyChunk), make([]byte, copyChunk)
	for r := range ranges.All() {
		for off := r.Off; off < r.End(); {
			n := min(copyChunk, r.End()-off)
			for _, side := range []struct {
				d vdisk.Disk
				p []byte
			}{{x, a[:n]}, {y, b[:n]}} {
				clear(side.p)
				if have := min(n, side.d.Size()-off); have > 0 {
					if _, err := side.d.ReadAt(side.p[:have], off); err != nil && !errors.Is(err, io.EOF) {
						return 0, err
					}
				}
			}
			if !bytes.Equal(a[:n], b[:n]) {
				for i := range a[:n] {
					if a[i] != b[i] {
						return off + int64(i), nil
					}
				}
			}
			off += n
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
	return -1, nil
}

// diskError gives an error of an image its reason.
func diskError(err error) error {
	reason := typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
	switch {
	case err == nil:
		return nil
	case errors.Is(err, vdisk.ErrNotFound):
		reason = typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_MISSING
	case errors.Is(err, vdisk.ErrTruncated), errors.Is(err, vdisk.ErrSectorSize):
		reason = typesv1.ErrorReason_ERROR_REASON_DISK_IMAGE_TRUNCATED
	case errors.Is(err, vdisk.ErrUnsupported), errors.Is(err, vdisk.ErrBadFooter):
		reason = typesv1.ErrorReason_ERROR_REASON_DISK_FORMAT_UNSUPPORTED
	case errors.Is(err, vdisk.ErrLocked):
		reason = typesv1.ErrorReason_ERROR_REASON_DISK_IN_USE
	case errors.Is(err, vdisk.ErrTooLarge):
		reason = typesv1.ErrorReason_ERROR_REASON_DISK_TOO_LARGE
	}
	return errcat.Wrap(reason, err, "disk image")
}
