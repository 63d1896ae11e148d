package conformance

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit/hostsuite"
	"github.com/landfall-dr/landfall/libs/vdisk"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/imagedir"
	"github.com/landfall-dr/landfall/tools/nbdclient"
)

const (
	machineID = "6f2b6a0e-7c39-4d0e-9a55-0d4c1f6b7e21"
	mib       = 1 << 20
	diskSize  = 24 * mib
)

// images is a machine in a folder of images; its guest comes by NBD.
type images struct {
	*host
	machine *typesv1.Machine
	clients map[string]*nbdclient.Client
}

func newImages(t *testing.T) hostsuite.Rig {
	dir := shortDir(t)
	folder := filepath.Join(dir, "images", "web-01")
	require.NoError(t, os.MkdirAll(folder, 0o700))
	for file, format := range map[string]vdisk.Format{"os.raw": vdisk.FormatRaw, "data.vhd": vdisk.FormatVHD} {
		d, err := vdisk.Create(filepath.Join(folder, file), format, diskSize)
		require.NoError(t, err)
		require.NoError(t, d.Close())
	}
	require.NoError(t, os.WriteFile(filepath.Join(folder, imagedir.DefinitionFile), []byte(`version: 1
id: `+machineID+`
name: web-01
generation: 2
cpus: 1
memory: 1GiB
disks:
  - {id: os, image: os.raw, format: raw, os: true}
  - {id: data, image: data.vhd, format: vhd}
`), 0o600))
	r := &images{
		host:    startHost(t, settings{Dir: dir, Driver: "imagedir", Images: filepath.Dir(folder), NBD: "unix:" + filepath.Join(dir, "s", "nbd")}),
		clients: map[string]*nbdclient.Client{},
	}
	r.machine = r.host.machine().Machine
	t.Cleanup(r.hangUp)
	return r
}

func (r *images) hangUp() {
	for id, c := range r.clients {
		_ = c.Close()
		delete(r.clients, id)
	}
}

func (r *images) VM() string             { return machineID }
func (r *images) Disks() []*typesv1.Disk { return r.machine.Disks }

func (r *images) Restart() {
	r.close()
	r.kill()
	r.hangUp()
	r.start()
	r.machine = r.host.machine().Machine
}

// do has a guest's request done, over a new connection where the old one broke.
func (r *images) do(disk string, request func(*nbdclient.Client) error) error {
	if c := r.clients[disk]; c != nil {
		err := request(c)
		if err == nil {
			return nil
		}
		_ = c.Close()
		delete(r.clients, disk)
	}
	for _, d := range r.machine.Disks {
		if d.Id != disk {
			continue
		}
		ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
		defer cancel()
		c, err := nbdclient.Dial(ctx, d.ExportUri)
		if err != nil {
			return err
		}
		r.clients[disk] = c
		return request(c)
	}
	return errors.New("no disk " + disk)
}

func (r *images) Write(disk string, off int64, p []byte) error {
	return r.do(disk, func(c *nbdclient.Client) error {
		_, err := c.WriteAt(p, off)
		return err
	})
}

func (r *images) Zero(disk string, off, n int64) error {
	return r.do(disk, func(c *nbdclient.Client) error { return c.WriteZeroes(off, n) })
}

// shortDir is a folder with a name short enough for sockets.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "lf")
	require.NoError(t, err)
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestImagedir(t *testing.T) { hostsuite.Run(t, newImages) }
