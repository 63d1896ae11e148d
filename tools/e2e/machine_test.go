package e2e

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/landfall-dr/landfall/libs/testkit"
	"github.com/landfall-dr/landfall/libs/vdisk"
	"github.com/landfall-dr/landfall/tools/workload"
)

const mib = 1 << 20

// The machine of all tests.
const (
	machineName = "web-01"
	machineID   = "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6b7e22"
	vmName      = "sites/local/vms/" + machineID
)

// guestOf is the machine's workload: a raw OS disk and a data disk on fixed VHD.
func guestOf(seed uint64, osSize, dataSize int64) workload.Guest {
	return workload.Guest{Seed: seed, Disks: []workload.Disk{{ID: "os", Size: osSize}, {ID: "data", Size: dataSize}}}
}

// initialOf is the first content of the disks: of five MiB two are absent.
func initialOf(seed uint64) func(disk int, p []byte, off int64) {
	return func(disk int, p []byte, off int64) {
		for len(p) > 0 {
			n := min(int64(len(p)), mib-off%mib)
			if k := off / mib; k%5 == 1 || k%5 == 3 {
				clear(p[:n])
			} else {
				testkit.FillAt(p[:n], off, seed+uint64(disk))
			}
			p, off = p[n:], off+n
		}
	}
}

// makeMachine writes the machine's folder into images.
func makeMachine(images string, g workload.Guest, initial func(int, []byte, int64)) error {
	folder := filepath.Join(images, machineName)
	if err := os.MkdirAll(folder, 0o750); err != nil {
		return err
	}
	formats := []vdisk.Format{vdisk.FormatRaw, vdisk.FormatVHD}
	files := []string{"os.raw", "data.vhd"}
	buf := make([]byte, mib)
	for d, disk := range g.Disks {
		image, err := vdisk.Create(filepath.Join(folder, files[d]), formats[d], disk.Size)
		if err != nil {
			return err
		}
		for off := int64(0); off < disk.Size; off += mib {
			initial(d, buf, off)
			if vdisk.IsZero(buf) {
				continue
			}
			if _, err := image.WriteAt(buf, off); err != nil {
				return err
			}
		}
		if err := image.Close(); err != nil {
			return err
		}
	}
	definition := fmt.Sprintf(`version: 1
id: %s
name: %s
generation: 2
cpus: 2
memory: 4GiB
network_adapters:
  - {name: eth0, mac_address: "00:15:5d:00:00:01", network: production}
disks:
  - {id: os, image: os.raw, os: true}
  - {id: data, image: data.vhd}
`, machineID, machineName)
	return os.WriteFile(filepath.Join(folder, "vm.yaml"), []byte(definition), 0o600)
}
