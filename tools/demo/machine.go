package demo

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/workload"
)

// mib is the unit in which first content is drawn.
const mib = 1 << 20

// The demonstration's machine.
const (
	machineName = "web-01"
	machineID   = "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6b7e21"
	seed        = 20261122
)

// guest is the machine's workload: a raw OS disk and a data disk on fixed VHD.
func guest() workload.Guest {
	return workload.Guest{Seed: seed, Disks: []workload.Disk{{ID: "os", Size: 256 * mib}, {ID: "data", Size: 128 * mib}}}
}

var images = []struct {
	file   string
	format vdisk.Format
}{{"os.raw", vdisk.FormatRaw}, {"data.vhd", vdisk.FormatVHD}}

// initial is the first content of a disk: of ten MiB four are absent, three random, three text.
func initial(disk int, p []byte, off int64) {
	for len(p) > 0 {
		n := min(int64(len(p)), mib-off%mib)
		extent(disk, off/mib, p[:n], off%mib)
		p, off = p[n:], off+n
	}
}

func extent(disk int, k int64, p []byte, skip int64) {
	r := rand.New(rand.NewPCG(seed+uint64(disk), uint64(k)))
	kind := r.IntN(10)
	if kind < 4 {
		clear(p)
		return
	}
	var word [8]byte
	for i := int64(0); i < mib; i += 8 {
		v := r.Uint64()
		if kind >= 7 {
			binary.LittleEndian.PutUint64(word[:], v)
			copy(word[:], words[v%uint64(len(words))])
		} else {
			binary.LittleEndian.PutUint64(word[:], v)
		}
		if i+8 <= skip || i-skip >= int64(len(p)) {
			continue
		}
		for b := int64(0); b < 8; b++ {
			if at := i + b - skip; at >= 0 && at < int64(len(p)) {
				p[at] = word[b]
			}
		}
	}
}

var words = []string{"recover ", "replica ", "journal ", "point in", " time of", " a disk ", "snapshot", "failback"}

// makeMachine writes the machine's folder and returns how many bytes its disks hold.
func makeMachine(folder string) (data int64, err error) {
	if err := os.MkdirAll(folder, 0o750); err != nil {
		return 0, err
	}
	g := guest()
	buf := make([]byte, mib)
	for d, img := range images {
		image, err := vdisk.Create(filepath.Join(folder, img.file), img.format, g.Disks[d].Size)
		if err != nil {
			return 0, err
		}
		for off := int64(0); off < g.Disks[d].Size; off += mib {
			initial(d, buf, off)
			if vdisk.IsZero(buf) {
				continue
			}
			if _, err := image.WriteAt(buf, off); err != nil {
				return 0, err
			}
			data += mib
		}
		if err := image.Sync(); err != nil {
			return 0, err
		}
		if err := image.Close(); err != nil {
			return 0, err
		}
	}
	definition := fmt.Sprintf(`version: 1
id: %s
name: %s
generation: 2
cpus: 2
memory: 4GiB
network_adapters:
  - name: eth0
    mac_address: 00:15:5d:00:00:01
    network: production
disks:
  - {id: os, image: os.raw, os: true}
  - {id: data, image: data.vhd}
`, machineID, machineName)
	return data, os.WriteFile(filepath.Join(folder, "vm.yaml"), []byte(definition), 0o600)
}
