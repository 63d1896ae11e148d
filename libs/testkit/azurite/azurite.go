// Package azurite runs the real storage emulator Azurite, as installed by `make azurite` at the version that tools/azurite
// locks, for tests and benchmarks.
//
// Each server has a free loopback port, accounts and keys of its own and a folder of its own. It is ended by SIGTERM to its
// own process, and ends by itself when the process that started it dies. Azurite is one thread of Node: keep 4 to 8 requests
// in flight, volumes small and page blobs below 20,000 ranges. What it gets wrong without saying so is listed in package
// azurefake, which enforces it.
//
// In a test:
//
//	s := azurite.Start(t)
//	client, err := azblob.NewClientFromConnectionString(s.ConnectionString(), nil)
//
// Elsewhere use [Run] and [Server.Stop].
package azurite

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/landfall-dr/landfall/libs/testkit"
)

// Env names the environment variable with the folder that Azurite is installed in (the one with node_modules), for programs
// that do not run inside the repository.
const Env = "LANDFALL_AZURITE"

// ErrMissing: Node or the installed Azurite was not found. Run `make azurite`.
var ErrMissing = errors.New("azurite is not installed")

const (
	startTimeout = 60 * time.Second // a cold start of Node on a busy machine takes seconds
	stopTimeout  = 20 * time.Second // SIGTERM writes the metadata out
	tailBytes    = 8 << 10          // of its output, kept for error messages
)

// Account is one storage account of a server.
type Account struct {
	Name string // 3 to 24 of a-z and 0-9
	Key  string // base64
}

// NewAccount returns an account with a random name and key.
func NewAccount() Account {
	var name [6]byte
	var key [64]byte
	rand.Read(name[:])
	rand.Read(key[:])
	return Account{Name: "lf" + hex.EncodeToString(name[:]), Key: base64.StdEncoding.EncodeToString(key[:])}
}

// Options of a server. The zero value is one new account in a temporary folder over plain http.
type Options struct {
	// Accounts to serve; none is one of [NewAccount]. An empty key is replaced by a random one.
	Accounts []Account
	// Folder keeps the data. Empty is a temporary folder that Stop removes.
	Folder string
	// Port on loopback; 0 takes a free one.
	Port int
	// CertFile and KeyFile (PEM) make it serve https.
	CertFile, KeyFile string
	// OAuth accepts bearer tokens, needs https. Audience, issuer and times are checked, the signature is not.
	OAuth bool
	// Install is the folder with node_modules; empty searches: [Env], then tools/azurite from the working directory upward.
	Install string
}

// Server is a running Azurite. Its methods may be called concurrently.
type Server struct {
	// Account and Key are those of the first account.
	Account, Key string

	accounts []Account
	base     string // http://127.0.0.1:port
	folder   string
	remove   bool
	cmd      *exec.Cmd
	stdin    io.Closer
	tail     *tail
	exited   chan struct{}
	exitErr  error
	stop     sync.Once
}

// Start runs a server until the end of the test. It skips the test, loudly, where Node or the installed Azurite is missing,
// and fails it there under CI=true. opts change the options before the start.
func Start(t testing.TB, opts ...func(*Options)) *Server {
	t.Helper()
	var o Options
	for _, opt := range opts {
		opt(&o)
	}
	s, err := Run(testkit.Context(t), o)
	if errors.Is(err, ErrMissing) && os.Getenv("CI") != "true" {
		fmt.Fprintf(os.Stderr, "=== SKIPPED, NOT TESTED ON AZURITE: %s: %v (make azurite)\n", t.Name(), err)
		t.Skipf("%v", err)
	}
	if err != nil {
		t.Fatalf("start azurite: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("stop azurite: %v", err)
		}
	})
	return s
}

// WithAccounts is an option of [Start]: accounts of these names with random keys.
func WithAccounts(names ...string) func(*Options) {
	return func(o *Options) {
		for _, n := range names {
			o.Accounts = append(o.Accounts, Account{Name: n})
		}
	}
}

// Run starts a server and returns when it answers. ctx bounds the start only; the caller calls Stop.
// [ErrMissing] when it is not installed.
func Run(ctx context.Context, o Options) (*Server, error) {
	node, program, err := find(o.Install)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s := &Server{accounts: slices.Clone(o.Accounts), folder: o.Folder, exited: make(chan struct{}), tail: &tail{}}
	if len(s.accounts) == 0 {
		s.accounts = []Account{NewAccount()}
	}
	pairs := make([]string, len(s.accounts))
	for i := range s.accounts {
		if s.accounts[i].Key == "" {
			s.accounts[i].Key = NewAccount().Key
		}
		pairs[i] = s.accounts[i].Name + ":" + s.accounts[i].Key
	}
	s.Account, s.Key = s.accounts[0].Name, s.accounts[0].Key
	if s.folder == "" {
		if s.folder, err = os.MkdirTemp("", "azurite-"); err != nil {
			return nil, fmt.Errorf("make azurite's folder: %w", err)
		}
		s.remove = true
	}
	guard := filepath.Join(s.folder, "end-with-parent.js")
	if err := os.WriteFile(guard, []byte(guardScript), 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("write azurite's guard: %w", err), s.clean())
	}
	args := []string{"--require", guard, program, "--blobHost", "127.0.0.1", "--blobPort", strconv.Itoa(o.Port), "-l", s.folder,
		"--silent", "--disableTelemetry", "--skipApiVersionCheck"}
	if o.CertFile != "" {
		args = append(args, "--cert", o.CertFile, "--key", o.KeyFile)
	}
	if o.OAuth {
		args = append(args, "--oauth", "basic")
	}
	s.cmd = exec.Command(node, args...)
	s.cmd.Dir = s.folder
	s.cmd.Env = append(os.Environ(), "AZURITE_ACCOUNTS="+strings.Join(pairs, ";"))
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// guardScript ends the emulator when its standard input closes, as it does when the starting process dies.
const guardScript = `process.stdin.on("close", () => process.kill(process.pid, "SIGTERM"));
process.stdin.on("error", () => {});
process.stdin.resume();
process.stdin.unref(); // it does not keep the emulator alive after SIGTERM
`

func (s *Server) start(ctx context.Context) error {
	out, w, err := os.Pipe()
	if err != nil {
		return errors.Join(fmt.Errorf("pipe for azurite: %w", err), s.clean())
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	stdin, err := s.cmd.StdinPipe()
	if err == nil {
		err = s.cmd.Start()
	}
	w.Close()
	if err != nil {
		out.Close()
		return errors.Join(fmt.Errorf("start %s: %w", s.cmd.Path, err), s.clean())
	}
	s.stdin = stdin
	listening := make(chan string, 1)
	go func() {
		defer close(s.exited)
		defer out.Close()
		s.read(out, listening)
		s.exitErr = s.cmd.Wait()
	}()
	select {
	case s.base = <-listening:
	case <-s.exited:
		return errors.Join(fmt.Errorf("azurite ended at its start (%w): %s", orNil(s.exitErr), s.tail), s.clean())
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("azurite did not start: %w: %s", context.Cause(ctx), s.tail), s.Stop())
	}
	if err := testkit.Poll(ctx, func(ctx context.Context) (bool, error) { return s.answers(ctx), nil }); err != nil {
		return errors.Join(fmt.Errorf("azurite listens and does not answer: %w: %s", err, s.tail), s.Stop())
	}
	return nil
}

// read keeps the end of the output, and sends the URL of the line that says where it listens.
func (s *Server) read(out io.Reader, listening chan<- string) {
	lines := bufio.NewReader(out)
	sent := false
	for {
		line, err := lines.ReadString('\n')
		s.tail.add(line)
		if _, url, ok := strings.Cut(line, "successfully listens on "); ok && !sent {
			sent = true
			listening <- strings.TrimSpace(url)
		}
		if err != nil {
			return
		}
	}
}

// answers says whether it speaks HTTP: any answer will do, a request without a signature is refused.
func (s *Server) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL()+"?comp=list", nil)
	if err != nil {
		return false
	}
	// Nothing is sent or believed here, so the certificate does not matter.
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}

// Stop ends the server by SIGTERM, which loses nothing that was acknowledged, waits for it, and removes its folder if that
// was a temporary one. Later calls do nothing.
func (s *Server) Stop() error {
	var err error
	s.stop.Do(func() {
		if s.cmd.Process.Signal(syscall.SIGTERM) != nil { // not on Windows
			_ = s.cmd.Process.Kill()
		}
		s.stdin.Close()
		timer := time.NewTimer(stopTimeout)
		defer timer.Stop()
		select {
		case <-s.exited:
		case <-timer.C:
			_ = s.cmd.Process.Kill()
			<-s.exited
			err = fmt.Errorf("azurite did not end within %s: %s", stopTimeout, s.tail)
		}
		err = errors.Join(err, s.clean())
	})
	return err
}

func (s *Server) clean() error {
	if !s.remove {
		return nil
	}
	return os.RemoveAll(s.folder)
}

// Pid is the process id, for tests that end it themselves.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Folder is where the data is kept.
func (s *Server) Folder() string { return s.folder }

// Accounts are all accounts of the server.
func (s *Server) Accounts() []Account { return slices.Clone(s.accounts) }

// URL is the blob endpoint of the first account, http://127.0.0.1:PORT/ACCOUNT.
func (s *Server) URL() string { return s.URLOf(s.accounts[0]) }

// URLOf is the blob endpoint of an account.
func (s *Server) URLOf(a Account) string { return s.base + "/" + a.Name }

// ConnectionString is that of the first account.
func (s *Server) ConnectionString() string { return s.ConnectionStringOf(s.accounts[0]) }

// ConnectionStringOf is the connection string of an account.
func (s *Server) ConnectionStringOf(a Account) string {
	scheme, _, _ := strings.Cut(s.base, ":")
	return fmt.Sprintf("DefaultEndpointsProtocol=%s;AccountName=%s;AccountKey=%s;BlobEndpoint=%s;", scheme, a.Name, a.Key, s.URLOf(a))
}

// find returns Node's program and Azurite's script.
func find(install string) (node, program string, err error) {
	node, err = exec.LookPath("node")
	if err != nil {
		return "", "", fmt.Errorf("%w: no node in the path", ErrMissing)
	}
	const script = "node_modules/azurite/dist/src/blob/main.js"
	if install == "" {
		install = os.Getenv(Env)
	}
	if install != "" {
		program = filepath.Join(install, filepath.FromSlash(script))
		if _, err := os.Stat(program); err != nil {
			return "", "", fmt.Errorf("%w in %s", ErrMissing, install)
		}
		program, err = filepath.Abs(program)
		return node, program, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", "", fmt.Errorf("find azurite: %w", err)
	}
	for {
		program = filepath.Join(dir, "tools", "azurite", filepath.FromSlash(script))
		if _, err := os.Stat(program); err == nil {
			return node, program, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", "", fmt.Errorf("%w: no tools/azurite/node_modules above the working directory, and %s is not set", ErrMissing, Env)
		}
		dir = up
	}
}

// tail keeps the end of what was written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) add(line string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, line...)
	if len(t.buf) > tailBytes {
		t.buf = slices.Clone(t.buf[len(t.buf)-tailBytes:])
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.buf))
}

func orNil(err error) error {
	if err == nil {
		return errors.New("exit code 0")
	}
	return err
}
