package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/landfall-dr/landfall/tools/guest"
)

const mib = 1 << 20

// CacheEnv names the environment variable with the cache folder.
const CacheEnv = "LANDFALL_GUEST_CACHE"

// Options says what to build.
type Options struct {
	// Cache is where packages and what was taken out of them are kept.
	Cache string
	// Out is the folder that gets os.raw and data.raw.
	Out string
	// OSBytes and DataBytes are the disks' sizes, whole MiB.
	OSBytes, DataBytes int64
	// Settings go onto the OS disk.
	Settings guest.Settings
	// Program is a landfall-guest that is built already; empty builds it by `go build`, which needs the repository as working folder.
	Program string
	// KernelArgs are added to the kernel's command line.
	KernelArgs string
}

// Default is two disks of 256 MiB, 20 steps a second, packages in DefaultCache, no output folder.
func Default() Options {
	return Options{
		Cache: DefaultCache(), OSBytes: 256 * mib, DataBytes: 256 * mib, Settings: guest.Settings{Rate: 20},
	}
}

// DefaultCache is the folder named by LANDFALL_GUEST_CACHE, or one among the user's caches.
func DefaultCache() string {
	if dir := os.Getenv(CacheEnv); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "landfall-guest")
}

// Smallest disks that hold what is put on them and the writer's files.
const (
	minOS   = 160 * mib
	minData = 64 * mib
)

// Validate tells all that is wrong.
func (o Options) Validate() error {
	var errs []error
	if o.Cache == "" {
		errs = append(errs, errors.New("cache folder: empty"))
	}
	if o.Out == "" {
		errs = append(errs, errors.New("output folder: empty"))
	}
	for _, d := range []struct {
		name      string
		size, min int64
	}{{"OS disk", o.OSBytes, minOS}, {"data disk", o.DataBytes, minData}} {
		if d.size < d.min || d.size%mib != 0 {
			errs = append(errs, fmt.Errorf("%s: %d bytes, must be whole MiB and at least %d MiB", d.name, d.size, d.min/mib))
		}
	}
	return errors.Join(errs...)
}
