package scenario

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

// What a storage account does to a machine that replicates, and what the person on duty reads: each of these heals by itself
// once its cause is gone, without a command, and nothing is lost.
func TestStorageRefusals(t *testing.T) {
	t.Parallel()
	a := newAccount(t)
	a.up()
	a.applyNow("quick", "1s", "")
	a.protect("quick")
	text := ""
	for _, tc := range []struct {
		name   string
		reason string
		harm   func() (heal func())
	}{
		{"the SAS has expired, and is renewed in its file", "STORAGE_CREDENTIALS", func() func() {
			a.renew(a.srv.SAS("rwdlac", time.Now().Add(-time.Minute)))
			return func() { a.renew(a.srv.SAS("rwdlac", time.Now().Add(time.Hour))) }
		}},
		{"the right to create in the journal is taken away, and given back", "STORAGE_PERMISSION", func() func() {
			return a.intercept(func(r *http.Request) azurefake.Fault {
				if in(r, "j") && r.Method == http.MethodPut {
					return azurefake.Fault{Status: 403, Code: "AuthorizationPermissionMismatch"}
				}
				return azurefake.Fault{}
			})
		}},
		{"the right to write replica disks is taken away, and given back", "STORAGE_PERMISSION", func() func() {
			return a.intercept(func(r *http.Request) azurefake.Fault {
				if in(r, "r") && r.Method == http.MethodPut {
					return azurefake.Fault{Status: 403, Code: "AuthorizationPermissionMismatch"}
				}
				return azurefake.Fault{}
			})
		}},
		{"the account is full, and gets room again", "STORAGE_FULL", func() func() {
			a.srv.SetFull(true)
			return func() { a.srv.SetFull(false) }
		}},
		{"the account throttles for a while", "STORAGE_UNAVAILABLE", func() func() {
			return a.intercept(func(*http.Request) azurefake.Fault { return azurefake.Busy(time.Second) })
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := a.points()
			heal := tc.harm()
			a.write()
			text += "# " + tc.name + "\n" + a.says(tc.reason)
			if tc.reason != "STORAGE_FULL" && !strings.Contains(tc.name, "replica disks") && !strings.Contains(tc.name, "create") {
				text += a.fails(tc.reason, "points", "web-01")
			}
			heal()
			a.whole(before)
			text += "\n"
		})
	}
	a.awaitPoint("web-01", a.status("web-01").LastPoint)
	a.same("web-01", "os", filepath.Join(a.images, "web-01", "os.raw"))
	require.NotContains(t, text, "INTERNAL")
	golden(t, "storage-refusals.golden", text)
}
