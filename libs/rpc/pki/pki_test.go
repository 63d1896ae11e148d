package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var tracker = ServiceIdentity("host-provider", "change-tracker").On("hv-01")

func TestIdentityStrings(t *testing.T) {
	require.Equal(t, "service host-provider on hv-01", tracker.String())
	require.Equal(t, "user ann@example.org (admin)", UserIdentity("ann@example.org", RoleAdmin).String())
	require.True(t, tracker.IsService("change-tracker"))
	require.False(t, UserIdentity("change-tracker", RoleAdmin).IsService("change-tracker"))
	var uris []string
	for _, u := range append(tracker.URIs(), UserIdentity("ann", RoleOperator).URIs()...) {
		uris = append(uris, u.String())
	}
	require.Equal(t, []string{
		"landfall://service/host-provider/hv-01", "landfall://service/change-tracker/hv-01", "landfall://user/ann?role=operator",
	}, uris)
}

func TestIdentityRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a-z0-9][A-Za-z0-9._-]{0,20}`)
		id := ServiceIdentity(name.Draw(t, "name"), rapid.SliceOfN(name, 0, 3).Draw(t, "aliases")...)
		if rapid.Bool().Draw(t, "user") {
			id = UserIdentity(id.Name, Role(rapid.IntRange(1, 3).Draw(t, "role")))
		} else if rapid.Bool().Draw(t, "bound") {
			id = id.On(name.Draw(t, "host"))
		}
		got, err := FromCertificate(&x509.Certificate{URIs: id.URIs()})
		require.NoError(t, err)
		require.True(t, id.Equal(got), "%v %v", id, got)
	})
}

func TestForeignCertificatesHaveNoIdentity(t *testing.T) {
	for _, uris := range [][]string{
		{}, {"spiffe://x/y"}, {"landfall://service"}, {"landfall://service/a/b/c"}, {"landfall://robot/a"},
		{"landfall://user/a"}, {"landfall://user/a?role=none"}, {"landfall://user/a?role=god"}, {"landfall://user/a/b?role=admin"},
		{"landfall://service/a", "landfall://user/a?role=admin"}, {"landfall://service/a/h1", "landfall://service/b/h2"},
		{"landfall://service/a%20b"}, {"landfall://service/a@b"}, {"landfall://service/-a"},
	} {
		cert := &x509.Certificate{}
		for _, s := range uris {
			u, err := url.Parse(s)
			require.NoError(t, err)
			cert.URIs = append(cert.URIs, u)
		}
		_, err := FromCertificate(cert)
		require.Error(t, err, "%v", uris)
	}
}

func TestRequestsAreChecked(t *testing.T) {
	ca, err := Open(t.TempDir(), time.Now)
	require.NoError(t, err)
	for _, id := range []Identity{
		{}, {Kind: "robot", Name: "x"}, {Kind: User, Name: "x"}, {Kind: Service, Name: "x", Role: RoleAdmin},
		ServiceIdentity("a/b"), ServiceIdentity("a", ""), ServiceIdentity("a").On("h/1"), UserIdentity("x", RoleViewer).On("h"),
	} {
		dir := filepath.Join(t.TempDir(), "new")
		_, err := ca.Ensure(dir, Request{Identity: id})
		require.Error(t, err, "%+v", id)
		require.NoDirExists(t, dir)
	}
}

func TestEnsure(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	ca, err := Open(filepath.Join(t.TempDir(), "ca"), clock)
	require.NoError(t, err)
	dir := filepath.Join(t.TempDir(), "cert")
	ensure := func(req Request) (issued bool, key []byte) {
		t.Helper()
		issued, err := ca.Ensure(dir, req)
		require.NoError(t, err)
		_, err = Load(dir, clock)
		require.NoError(t, err)
		key, err = os.ReadFile(filepath.Join(dir, KeyFile))
		require.NoError(t, err)
		return issued, key
	}
	req := Request{Identity: tracker, Names: []string{"hv-01.corp", "10.0.0.1", "localhost", "127.0.0.1"}, Lifetime: 30 * 24 * time.Hour}
	issued, key := ensure(req)
	require.True(t, issued)
	issued, _ = ensure(req)
	require.False(t, issued, "what is good stays")

	files, err := Load(dir, clock)
	require.NoError(t, err)
	require.True(t, tracker.Equal(files.Identity()))
	require.Equal(t, now.Add(req.Lifetime), files.NotAfter())
	leaf := files.pair.Leaf
	require.Equal(t, []string{"localhost", "hv-01.corp"}, leaf.DNSNames)
	require.Len(t, leaf.IPAddresses, 3)
	require.NoError(t, leaf.VerifyHostname("127.0.0.1"))

	now = now.Add(21 * 24 * time.Hour)
	issued, same := ensure(req)
	require.True(t, issued, "less than a third is left")
	require.Equal(t, key, same, "a renewal keeps the key")
	require.Equal(t, now.Add(req.Lifetime), files.NotAfter(), "a running program sees it")
	require.NoError(t, files.Err())

	for what, change := range map[string]func(){
		"another identity": func() { req.Identity = ServiceIdentity("uploader") },
		"another name":     func() { req.Names = nil },
		"a truncated certificate": func() {
			require.NoError(t, os.Truncate(filepath.Join(dir, CertFile), 100))
		},
		"no certificate": func() { require.NoError(t, os.Remove(filepath.Join(dir, CertFile))) },
		"no key":         func() { require.NoError(t, os.Remove(filepath.Join(dir, KeyFile))) },
		"another CA": func() {
			ca, err = Open(filepath.Join(t.TempDir(), "ca2"), clock)
			require.NoError(t, err)
		},
	} {
		change()
		issued, _ = ensure(req)
		require.True(t, issued, what)
		issued, _ = ensure(req)
		require.False(t, issued, what)
	}
}

func TestFilesKeepTheLastGoodOnes(t *testing.T) {
	ca, err := Open(filepath.Join(t.TempDir(), "ca"), time.Now)
	require.NoError(t, err)
	dir := t.TempDir()
	_, err = Load(dir, time.Now)
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = ca.Ensure(dir, Request{Identity: tracker})
	require.NoError(t, err)
	files, err := Load(dir, time.Now)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, KeyFile), []byte("half a co"), 0o600))
	require.True(t, tracker.Equal(files.Identity()))
	require.Error(t, files.Err())
	require.NoError(t, os.Remove(filepath.Join(dir, CAFile)))
	require.ErrorIs(t, files.Err(), fs.ErrNotExist)
	require.True(t, tracker.Equal(files.Identity()))
}

// TestConcurrentStartsAgree: programs that start at once on one state directory end with one CA and
// certificates that trust each other.
func TestConcurrentStartsAgree(t *testing.T) {
	root := t.TempDir()
	const n = 8
	cas := make([]*Authority, n)
	var g errgroup.Group
	for i := range n {
		g.Go(func() (err error) {
			if cas[i], err = Open(filepath.Join(root, "ca"), time.Now); err != nil {
				return err
			}
			for _, dir := range []string{"shared", fmt.Sprint(i)} {
				if _, err := cas[i].Ensure(filepath.Join(root, dir), Request{Identity: tracker}); err != nil {
					return err
				}
				if _, err := Load(filepath.Join(root, dir), time.Now); err != nil {
					return err
				}
			}
			return nil
		})
	}
	require.NoError(t, g.Wait())
	for i := range n {
		require.Equal(t, cas[0].Certificate(), cas[i].Certificate())
		require.NoError(t, handshake(t, filepath.Join(root, "shared"), filepath.Join(root, fmt.Sprint(i))))
	}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		require.False(t, strings.HasPrefix(d.Name(), tmpPrefix), path)
		return err
	}))
}

// TestKilledStartsAreCompleted: a kill leaves some of the files, never half of one.
func TestKilledStartsAreCompleted(t *testing.T) {
	whole := t.TempDir()
	_, err := Open(whole, time.Now)
	require.NoError(t, err)
	key, err := os.ReadFile(filepath.Join(whole, caKeyFile))
	require.NoError(t, err)

	killed := t.TempDir() // after the key, in the middle of writing the certificate
	require.NoError(t, os.WriteFile(filepath.Join(killed, caKeyFile), key, 0o600))
	left := filepath.Join(killed, tmpPrefix+"0123")
	require.NoError(t, os.WriteFile(left, []byte("-----BEGIN"), 0o600))
	_, err = Open(killed, time.Now)
	require.NoError(t, err)
	require.FileExists(t, left, "it could be another process's")
	_, err = Open(killed, func() time.Time { return time.Now().Add(2 * tmpAge) })
	require.NoError(t, err)
	require.NoFileExists(t, left)
}

func TestOpenRefuses(t *testing.T) {
	fresh := func(t *testing.T) string {
		dir := t.TempDir()
		_, err := Open(dir, time.Now)
		require.NoError(t, err)
		return dir
	}
	t.Run("a damaged key is not overwritten", func(t *testing.T) {
		dir := fresh(t)
		require.NoError(t, os.WriteFile(filepath.Join(dir, caKeyFile), []byte("x"), 0o600))
		_, err := Open(dir, time.Now)
		require.ErrorContains(t, err, caKeyFile)
	})
	t.Run("key and certificate of two CAs", func(t *testing.T) {
		dir := fresh(t)
		other, err := os.ReadFile(filepath.Join(fresh(t), CAFile))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, CAFile), other, 0o600))
		_, err = Open(dir, time.Now)
		require.ErrorContains(t, err, "do not belong together")
	})
	t.Run("an expired CA", func(t *testing.T) {
		_, err := Open(fresh(t), func() time.Time { return time.Now().Add(2 * CALifetime) })
		require.ErrorContains(t, err, "expired")
	})
	t.Run("a key that others can read", func(t *testing.T) {
		if runtime.GOOS == "windows" {
			t.Skip("access is by ACL there")
		}
		dir := fresh(t)
		info, err := os.Stat(filepath.Join(dir, caKeyFile))
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o600), info.Mode().Perm())
		require.NoError(t, os.Chmod(filepath.Join(dir, caKeyFile), 0o640))
		_, err = Open(dir, time.Now)
		require.ErrorContains(t, err, "chmod 600")
	})
}

// handshake does mutual TLS between two certificate folders.
func handshake(t *testing.T, serverDir, clientDir string) error {
	t.Helper()
	server, err := Load(serverDir, time.Now)
	require.NoError(t, err)
	client, err := Load(clientDir, time.Now)
	require.NoError(t, err)
	a, b := net.Pipe()
	defer func() { _ = a.Close() }()
	defer func() { _ = b.Close() }()
	var g errgroup.Group
	g.Go(func() error {
		s := tls.Server(a, server.Server(nil))
		return errors.Join(s.Handshake(), s.Close())
	})
	c := tls.Client(b, client.Client(nil))
	if err := c.Handshake(); err != nil {
		_ = b.Close()
		return errors.Join(err, g.Wait())
	}
	_, _ = c.Read(make([]byte, 1)) // until the server's close
	return errors.Join(g.Wait())
}
