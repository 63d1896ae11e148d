// Package backend opens the blobstore that an address names.
//
//	/var/lib/landfall/store, dir:///var/lib/landfall/store    a folder
//	https://ACCOUNT.blob.core.windows.net                     an Azure storage account
//	http://127.0.0.1:PORT/ACCOUNT                             an emulator
package backend

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/dir"
	"github.com/landfall-dr/landfall/libs/config"
)

// Settings say where lineages are stored: a folder, or a storage account.
type Settings struct {
	Dir   string         `koanf:"dir" help:"folder of the store"`
	URL   string         `koanf:"url" help:"https://ACCOUNT.blob.core.windows.net of the store, http://host:port/ACCOUNT of an emulator, or dir:///folder"`
	Azure azure.Settings `koanf:"azure"`
}

// DefaultSettings name no store.
func DefaultSettings() Settings { return Settings{Azure: azure.DefaultSettings()} }

// Options of [Open].
type Options struct {
	// Dir are the folder's.
	Dir dir.Options
	// Azure are the account's.
	Azure azure.Options
	// Later leaves it to the first call to find out whether an account can be reached: what runs beside machines must start
	// without it.
	Later bool
}

// Kinds of stores.
const (
	KindDir   = "dir"
	KindAzure = "azure"
)

// Parse returns the settings that an address means, with the credentials and limits of from: for flags like --store.
func Parse(address string, from Settings) (Settings, error) {
	s := Settings{Azure: from.Azure}
	if strings.Contains(address, "://") {
		s.URL = address
	} else {
		s.Dir = address
	}
	if _, _, err := s.place(); err != nil {
		return from, err
	}
	return s, nil
}

// IsSet tells whether a store is named.
func (s Settings) IsSet() bool { return s.Dir != "" || s.URL != "" || s.Azure.ConnectionString.IsSet() }

// Kind is what the settings name: [KindDir], [KindAzure], or "" when that is not clear.
func (s Settings) Kind() string {
	kind, _, err := s.place()
	if err != nil {
		return ""
	}
	return kind
}

// place returns the kind and the folder or the account's address.
func (s Settings) place() (kind, where string, err error) {
	switch {
	case s.Dir != "" && s.URL != "":
		return "", "", config.Bad("url", "both dir and url are given: one store only")
	case s.Dir != "":
		return KindDir, s.Dir, nil
	case s.URL == "" && s.Azure.ConnectionString.IsSet():
		return KindAzure, "", nil
	case s.URL == "":
		return "", "", config.Bad("url", "no store is named: set dir or url")
	}
	u, err := url.Parse(s.URL)
	if err != nil {
		return "", "", config.Bad("url", "is no address") // its text would repeat what may be a secret
	}
	switch u.Scheme {
	case "http", "https":
		return KindAzure, s.URL, nil
	case "dir", "file":
		if u.Host != "" || u.Path == "" || u.RawQuery != "" {
			return "", "", config.Bad("url", "want dir:///folder, with three slashes")
		}
		return KindDir, folder(u.Path), nil
	case "":
		return KindDir, s.URL, nil
	}
	if len(u.Scheme) == 1 { // C:\folder
		return KindDir, s.URL, nil
	}
	return "", "", config.Bad("url", "%s:// is no store: want https://, dir:// or a folder", u.Scheme)
}

// folder turns the path of a URL into one of this system: /C:/x is C:\x.
func folder(path string) string {
	if len(path) > 2 && path[0] == '/' && path[2] == ':' {
		path = path[1:]
	}
	return filepath.FromSlash(path)
}

// Validate reports what the sections cannot see alone. No store at all is no problem here: a program that needs one says so
// by [Settings.Require].
func (s Settings) Validate() error {
	if !s.IsSet() {
		return nil
	}
	kind, where, err := s.place()
	if err != nil || kind != KindAzure {
		return err
	}
	return s.Azure.ValidateURL(where)
}

// Require is Validate for a program that cannot do without a store.
func (s Settings) Require() error {
	if !s.IsSet() {
		return config.Bad("url", "no store is named: set dir or url")
	}
	return s.Validate()
}

// checkTime bounds the first question to an account.
const checkTime = 30 * time.Second

// Open opens the store and, unless told otherwise, asks it for its time, so that an address that is wrong or not to be reached says so now. Whether
// the credentials are good for anything is not asked: that differs by role. The caller closes it.
func Open(ctx context.Context, s Settings, o Options) (blobstore.Store, error) {
	kind, where, err := s.place()
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if kind == KindDir {
		return dir.Open(where, o.Dir)
	}
	st, err := azure.Open(where, s.Azure, o.Azure)
	if err != nil {
		return nil, err
	}
	if o.Later {
		return st, nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	if _, err := st.Now(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("reach storage account %s: %w", st.Account(), err), st.Close())
	}
	return st, nil
}
