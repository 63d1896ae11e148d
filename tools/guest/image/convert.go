package image

import (
	"context"
	"fmt"
)

// Format is a disk format by QEMU's name.
type Format string

// The formats of the lab.
const (
	Raw   Format = "raw"
	VHDX  Format = "vhdx"  // dynamic
	QCOW2 Format = "qcow2" //
	VPC   Format = "vpc"   // fixed VHD of exactly the raw file's size
)

// Convert makes a disk of a format from a raw file.
func Convert(ctx context.Context, raw, to string, format Format) error {
	args := []string{"convert", "-f", "raw", "-O", string(format)}
	switch format {
	case Raw, QCOW2:
	case VHDX:
		args = append(args, "-o", "subformat=dynamic")
	case VPC:
		args = append(args, "-o", "subformat=fixed,force_size=on")
	default:
		return fmt.Errorf("convert a disk: unknown format %q", format)
	}
	if _, err := command(ctx, "", nil, "qemu-img", append(args, raw, to)...); err != nil {
		return fmt.Errorf("convert a disk: %w", err)
	}
	return nil
}
