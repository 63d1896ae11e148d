package qemu

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/testkit"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// TestForeignWhileOpen: what an operator or another program may do to the machine while a point is open. The guest and QEMU
// live, and no point is wrong.
func TestForeignWhileOpen(t *testing.T) {
	for name, do := range map[string]func(l *lab) error{
		"backup": func(l *lab) error {
			run(l.t, "qemu-img", "create", "-q", "-f", "raw", l.path("b.raw"), "8M")
			require.NoError(l.t, l.second.Execute(l.ctx(), "blockdev-add", arguments{"driver": "file", "node-name": "backup", "filename": l.path("b.raw")}, nil))
			return l.second.Execute(l.ctx(), "blockdev-backup", arguments{"device": "d0", "target": "backup", "sync": "none", "job-id": "their"}, nil)
		},
		"mirror": func(l *lab) error {
			run(l.t, "qemu-img", "create", "-q", "-f", "raw", l.path("b.raw"), "8M")
			require.NoError(l.t, l.second.Execute(l.ctx(), "blockdev-add", arguments{"driver": "file", "node-name": "backup", "filename": l.path("b.raw")}, nil))
			return l.second.Execute(l.ctx(), "blockdev-mirror", arguments{"device": "d0", "target": "backup", "sync": "full", "job-id": "their"}, nil)
		},
		"snapshot": func(l *lab) error {
			run(l.t, "qemu-img", "create", "-q", "-f", "qcow2", l.path("o.qcow2"), "8M")
			require.NoError(l.t, l.second.Execute(l.ctx(), "blockdev-add", arguments{
				"driver": "qcow2", "node-name": "overlay", "backing": nil, "file": arguments{"driver": "file", "filename": l.path("o.qcow2")},
			}, nil))
			return l.second.Execute(l.ctx(), "blockdev-snapshot", arguments{"node": "d0", "overlay": "overlay"}, nil)
		},
		"resize": func(l *lab) error {
			return l.second.Execute(l.ctx(), "block_resize", arguments{"node-name": "d1", "size": imageSize + mib}, nil)
		},
		"reset":  func(l *lab) error { return l.second.Execute(l.ctx(), "system_reset", nil, nil) },
		"savevm": func(l *lab) error { out, err := l.second.HMP(l.ctx(), "savevm x"); l.t.Log(out); return err },
		"loadvm": func(l *lab) error { out, err := l.second.HMP(l.ctx(), "loadvm x"); l.t.Log(out); return err },
		"commit": func(l *lab) error { out, err := l.second.HMP(l.ctx(), "commit all"); l.t.Log(out); return err },
		"unplug": func(l *lab) error { return l.second.Execute(l.ctx(), "device_del", arguments{"id": "dev-d1"}, nil) },
		"writable": func(l *lab) error {
			return l.second.Execute(l.ctx(), "block-export-add", arguments{"type": "nbd", "id": "their", "node-name": "d0", "name": "their", "writable": true}, nil)
		},
	} {
		if !slices.Contains([]string{"backup", "snapshot", "resize", "reset"}, name) && os.Getenv("LANDFALL_EVERY_STEP") == "" {
			continue // QEMU refuses them, or nothing happens
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, formats("qcow2", "qcow2"))
			if name == "loadvm" {
				out, err := l.second.HMP(l.ctx(), "savevm x")
				require.NoError(t, err)
				require.Empty(t, out)
			}
			l.establish()
			l.copyAll(full)
			l.write("d0", 0, 3*mib, 5)
			n := l.next()
			_, err := l.cut(n)
			require.NoError(t, err)
			want := l.snapshot()
			l.write("d0", 4096, 70000, 6)
			t.Log("QEMU says:", do(l))
			l.write("d0", mib, 70000, 7)
			var status struct{ Status string }
			require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &status))
			p := l.points()
			if p.ResyncReason == 0 {
				l.ship(n)
				l.same(want, "point")
			}
			_, err = l.settle(n, commit)
			require.NoError(t, err)
			now, err := observe(l.ctx(), l.second)
			require.NoError(t, err)
			for n := range now.nodes {
				require.False(t, ours(n), "node %s is left", n)
			}
			switch name {
			case "snapshot":
				root, _ := now.root("/machine/peripheral/dev-d0")
				require.Equal(t, "overlay", root, "what the guest wrote since the snapshot is taken from it")
				require.NotZero(t, l.points().ResyncReason)
				return
			case "backup":
				_, err := l.cut(l.next())
				requireReason(t, err, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE)
				require.NoError(t, l.second.Execute(l.ctx(), "block-job-cancel", arguments{"device": "their", "force": true}, nil))
				testkit.Eventually(t, 5*time.Second, func() bool {
					s, err := observe(l.ctx(), l.second)
					root, _ := s.root("/machine/peripheral/dev-d0")
					return err == nil && root == "d0"
				})
			}
			l.point()
			l.tidy(1)
			require.NoError(t, l.second.Execute(l.ctx(), "query-status", nil, &status))
		})
	}
}

// TestInternalSnapshotLoaded: QEMU does not bring a machine back to an older state under a bitmap, which would not see it.
func TestInternalSnapshotLoaded(t *testing.T) {
	l := newLab(t, formats("qcow2", "qcow2"))
	l.write("d0", 0, mib, 3)
	out, err := l.second.HMP(l.ctx(), "savevm x")
	require.NoError(t, err)
	require.Empty(t, out)
	l.write("d0", 0, mib, 4)
	l.establish()
	l.copyAll(full)
	out, err = l.second.HMP(l.ctx(), "loadvm x")
	t.Log(out, err)
	require.NotEmpty(t, out)
	l.point()
}
