// Package backend opens the store that the settings name: a folder or an Azure storage account.
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

// Settings say where lineages are stored: a folder, or an account.
type Settings struct {
	// Dir is a folder of this machine or of a file server.
	Dir string `koanf:"dir" help:"folder of the store; alternatively url"`
	// URL is dir:///PATH, a plain path, or the address of an account's blob service. It may be empty where a connection string
	// names the account.
	URL string `koanf:"url" help:"where lineages are stored: https://ACCOUNT.blob.core.windows.net, or a folder"`
	// Azure has the credentials and limits of an account.
	Azure azure.Settings `koanf:"azure"`
}

// DefaultSettings name no store.
func DefaultSettings() Settings { return Settings{Azure: azure.DefaultSettings()} }

// IsSet reports whether they name a store.
func (s Settings) IsSet() bool { return s.Dir != "" || s.URL != "" || s.Azure.ConnectionString.IsSet() }

// Validate reports all problems that can be seen without opening the store. It does not ask its section azure.
func (s Settings) Validate() error {
	if !s.IsSet() {
		return nil
	}
	folder, account, err := s.place()
	if err != nil || folder != "" {
		return err
	}
	return s.Azure.ValidateURL(account)
}

// String is where it is, without credentials.
func (s Settings) String() string {
	folder, account, err := s.place()
	switch {
	case err != nil:
		return "an invalid store"
	case folder != "":
		return folder
	case account != "":
		return account
	case s.IsSet():
		return "the account of the connection string"
	}
	return "no store"
}

// place is the folder or the account's address; both are empty where a connection string names the account.
func (s Settings) place() (folder, account string, err error) {
	if s.Dir != "" && (s.URL != "" || s.Azure.ConnectionString.IsSet()) {
		return "", "", config.Bad("dir", "a folder and an account are both given: leave one out")
	}
	if s.Dir != "" {
		return s.Dir, "", nil
	}
	scheme, rest, found := strings.Cut(s.URL, ":")
	switch {
	case s.URL == "":
		return "", "", nil
	case !found, len(scheme) == 1, filepath.IsAbs(s.URL): // a path, on Windows with its drive
		return s.URL, "", nil
	case scheme == "http", scheme == "https":
		return "", s.URL, nil
	case scheme == "dir":
		u, err := url.Parse(s.URL)
		if err != nil || u.Host != "" || u.Path == "" && u.Opaque == "" {
			return "", "", config.Bad("url", "%q: a folder is dir:///PATH", s.URL)
		}
		return filepath.FromSlash(u.Path + u.Opaque), "", nil
	}
	return "", "", config.Bad("url", "%q: %s is not one of https, http, dir", rest, scheme)
}

// Options of Open.
type Options struct {
	// Clock is storage time of a folder, and what an account's is compared with; nil is time.Now.
	Clock func() time.Time
	// Azure tunes the backend of an account.
	Azure azure.Options
}

// ErrNone: the settings name no store.
var ErrNone = fmt.Errorf("no store is named: set store.dir or store.url: %w", blobstore.ErrInvalid)

// Open opens the store. Errors of the settings are those of package config; a folder that does not exist is made. An account is not
// asked anything yet.
func Open(_ context.Context, s Settings, o Options) (blobstore.Store, error) {
	if err := errors.Join(s.Validate()); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if !s.IsSet() {
		return nil, ErrNone
	}
	folder, account, err := s.place()
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if folder != "" {
		store, err := dir.Open(folder, dir.Options{Clock: o.Clock})
		if err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
		return store, nil
	}
	if o.Azure.Clock == nil {
		o.Azure.Clock = o.Clock
	}
	store, err := azure.Open(account, s.Azure, o.Azure)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return store, nil
}
