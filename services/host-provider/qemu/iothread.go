package qemu

import (
	"context"
	"strings"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// safeIOThread is the first QEMU whose NBD server survives a reader that leaves while the disk is served by an iothread.
// Older ones abort (blockdev-nbd.c: "Assertion `qemu_in_main_thread() && nbd_server' failed", seen with 7.2.22), and the
// guest with them. It is a defect and not a feature, so the schema does not tell it.
const safeIOThread = 9

// iothread names the iothread that serves a device in a QEMU in which reading the disk would end the guest; empty when there
// is no such danger.
func iothread(ctx context.Context, m *qmp.Monitor, device string) (string, error) {
	if m.Version().Major >= safeIOThread {
		return "", nil
	}
	var threads []struct {
		ID string `json:"id"`
	}
	if err := m.Execute(ctx, "query-iothreads", nil, &threads); err != nil || len(threads) == 0 {
		return "", err
	}
	get := func(path, property string) (string, error) {
		var value string
		err := m.Execute(ctx, "qom-get", arguments{"path": path, "property": property}, &value)
		if qmp.Refused(err) {
			return "", nil // no such property
		}
		return value, err
	}
	if thread, err := get(device, "iothread"); err != nil || thread != "" {
		return thread, err
	}
	// A SCSI disk is served by the thread of its controller, some way up its bus.
	bus, err := get(device, "parent_bus")
	for err == nil && strings.Count(bus, "/") > 2 {
		bus = bus[:strings.LastIndexByte(bus, '/')]
		var thread string
		if thread, err = get(bus, "iothread"); thread != "" {
			return thread, err
		}
	}
	return "", err
}
