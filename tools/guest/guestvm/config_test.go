package guestvm

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/tools/guest/image"
)

func TestArgs(t *testing.T) {
	cfg := Config{
		Name: "m", Dir: "/d", Sockets: "/s", Mode: Gen1,
		OS: Disk{"/d/os.vhd", image.VPC}, Data: Disk{"/d/data.vhdx", image.VHDX},
	}
	args, err := cfg.Args()
	require.NoError(t, err)
	line := strings.Join(args, " ")
	for _, want := range []string{
		"-accel tcg,thread=multi", "-machine pc", "-qmp unix:/s/m.qmp,server=on,wait=off",
		"driver=vpc,node-name=os,", "driver=vhdx,node-name=data,", "ide-hd,drive=os,id=dev-os,bootindex=1", "ide-hd,drive=data,id=dev-data",
		"name=org.qemu.guest_agent.0", "name=org.landfall.ack.0",
	} {
		require.Contains(t, line, want)
	}
	require.NotContains(t, line, "kvm")

	cfg.NoLab = true
	args, err = cfg.Args()
	require.NoError(t, err)
	require.NotContains(t, strings.Join(args, " "), "landfall.ack")

	cfg.Sockets, cfg.Mode = "/"+strings.Repeat("x", 120), "floppy"
	_, err = cfg.Args()
	require.ErrorContains(t, err, "107 bytes")
	require.ErrorContains(t, err, "floppy")
}
